//! How requests are matched and changed, the same for inbound and outbound routes.

use super::client::Backend;
use http::{HeaderName, HeaderValue, Method, StatusCode, uri::Scheme};
use regex::Regex;
use std::{sync::Arc, time::Duration};

/// A host that a route is for; compared with the authority of the request's URI, without its port.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum HostMatch {
    /// The whole name, lower case.
    Exact(Arc<str>),
    /// `.example.com`: the request must have at least one more label. Lower case, with the leading dot.
    Suffix(Arc<str>),
}

/// One alternative of a rule.
#[derive(Clone, Debug, PartialEq)]
pub enum RouteMatch {
    /// HTTP routes.
    Http(HttpMatch),
    /// gRPC routes: only POST requests whose path is `/service/method`.
    Grpc(GrpcMatch),
}

/// All parts that are given must hold.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct HttpMatch {
    /// Path; none = anything, with the rank of the prefix `/`.
    pub path: Option<PathMatch>,
    /// Headers, each compared with any one value of that header; `host` sees the authority.
    pub headers: Vec<HeaderMatch>,
    /// Query parameters, URL-decoded.
    pub query: Vec<QueryMatch>,
    /// Method.
    pub method: Option<Method>,
}

/// gRPC method and metadata.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct GrpcMatch {
    /// Service name, with its package.
    pub service: Option<StringMatch>,
    /// Method name.
    pub method: Option<StringMatch>,
    /// Metadata.
    pub headers: Vec<HeaderMatch>,
}

/// A URI path.
#[derive(Clone, Debug, PartialEq)]
pub enum PathMatch {
    /// Byte equality.
    Exact(Arc<str>),
    /// Whole segments; stored without trailing slashes, `/` as the empty string.
    Prefix(Arc<str>),
    /// Must cover the whole path.
    Regex(FullRegex),
}

/// A string.
#[derive(Clone, Debug, PartialEq)]
pub enum StringMatch {
    /// Equality.
    Exact(Arc<str>),
    /// Must cover the whole value.
    Regex(FullRegex),
}

/// A header.
#[derive(Clone, Debug, PartialEq)]
pub struct HeaderMatch {
    /// Its name.
    pub name: HeaderName,
    /// One of its values.
    pub value: StringMatch,
}

/// A query parameter.
#[derive(Clone, Debug, PartialEq)]
pub struct QueryMatch {
    /// Its name, decoded.
    pub name: Arc<str>,
    /// Its value, decoded.
    pub value: StringMatch,
}

/// A regular expression that must cover the whole text it is compared with.
#[derive(Clone, Debug)]
pub struct FullRegex {
    source: Arc<str>,
    anchored: Regex,
}

/// Which rule wins when several match a request.
#[derive(Copy, Clone, Debug, Default, PartialEq, Eq)]
pub enum Precedence {
    /// Linkerd's order (behaviour.md C.7): host, characters of the path whatever its kind, headers, query
    /// parameters, method, position.
    #[default]
    Linkerd,
    /// The Gateway API's order (resources.md 3.4): host, exact path, longer prefix, method, headers, query
    /// parameters, position.
    GatewayApi,
}

/// Something done to a request or its response.
#[derive(Clone, Debug, PartialEq)]
pub enum Filter {
    /// Change request headers.
    RequestHeaders(HeaderModifier),
    /// Change response headers.
    ResponseHeaders(HeaderModifier),
    /// Answer with a redirect.
    Redirect(Redirect),
    /// Change host or path before the request goes on.
    Rewrite(Rewrite),
    /// Send a copy elsewhere.
    Mirror(Arc<Mirror>),
    /// Answer preflights, add CORS headers.
    Cors(Arc<Cors>),
    /// Fail some requests.
    HttpFailure(HttpFailure),
    /// Fail some gRPC calls.
    GrpcFailure(GrpcFailure),
    /// The source named a filter that nobody knows: the request is answered 500.
    Unknown {
        /// What the source said, for the error text.
        what: Arc<str>,
    },
}

/// Applied in the order add, set, remove.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct HeaderModifier {
    /// Values appended.
    pub add: Vec<(HeaderName, HeaderValue)>,
    /// Values that replace all present ones.
    pub set: Vec<(HeaderName, HeaderValue)>,
    /// Names removed.
    pub remove: Vec<HeaderName>,
}

/// A redirect answer; what is not given comes from the request (behaviour.md C.8).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Redirect {
    /// Scheme of the location.
    pub scheme: Option<Scheme>,
    /// Host of the location.
    pub host: Option<Arc<str>>,
    /// Port of the location.
    pub port: Option<u16>,
    /// Path of the location.
    pub path: Option<ModifyPath>,
    /// Status.
    pub status: StatusCode,
}

/// A path replacement.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ModifyPath {
    /// The whole path. Linkerd's redirects drop the query with it, the Gateway API keeps it.
    ReplaceFull {
        /// New path.
        path: Arc<str>,
        /// Whether the request's query string is kept.
        keep_query: bool,
    },
    /// The part that the rule's prefix matched; the query is kept.
    ReplacePrefix(Arc<str>),
}

/// Host and path rewrite.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Rewrite {
    /// New host or authority.
    pub host: Option<Arc<str>>,
    /// New path.
    pub path: Option<ModifyPath>,
}

/// A copy of requests.
#[derive(Clone, Debug, PartialEq)]
pub struct Mirror {
    /// Where copies go; none if the backend reference was invalid, then nothing is mirrored.
    pub backend: Option<Backend>,
    /// Share of requests that are copied.
    pub ratio: Ratio,
}

/// CORS rules (resources.md 3.7).
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Cors {
    /// `*`, or `scheme://host[:port]` whose host may begin with `*`.
    pub allow_origins: Vec<String>,
    /// Methods, or only `*`.
    pub allow_methods: Vec<String>,
    /// Headers, or only `*`.
    pub allow_headers: Vec<String>,
    /// Headers that scripts may read.
    pub expose_headers: Vec<String>,
    /// Whether credentials may be sent.
    pub allow_credentials: bool,
    /// How long a preflight answer may be cached.
    pub max_age: Duration,
}

/// An injected HTTP failure.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HttpFailure {
    /// Status.
    pub status: StatusCode,
    /// Text for the error header.
    pub message: Arc<str>,
    /// Share of requests that fail.
    pub ratio: Ratio,
}

/// An injected gRPC failure.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GrpcFailure {
    /// gRPC code; above 16 becomes 2 (unknown).
    pub code: u16,
    /// Text for `grpc-message`.
    pub message: Arc<str>,
    /// Share of requests that fail.
    pub ratio: Ratio,
}

/// A share, `numerator / denominator`.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub struct Ratio {
    numerator: u32,
    denominator: u32,
}

impl Ratio {
    /// Everything.
    pub const ALWAYS: Self = Self { numerator: 1, denominator: 1 };

    /// None if the denominator is 0.
    pub fn new(numerator: u32, denominator: u32) -> Option<Self> {
        (denominator != 0).then_some(Self { numerator, denominator })
    }

    /// Draws once; `random` gives a number below its argument.
    pub fn draw(&self, random: impl FnOnce(u32) -> u32) -> bool {
        self.numerator >= self.denominator || (self.numerator > 0 && random(self.denominator) < self.numerator)
    }
}

impl FullRegex {
    /// Compiles an expression that must cover the whole text.
    ///
    /// # Errors
    /// The regex crate's, when the expression does not parse or is too large.
    pub fn new(source: &str) -> Result<Self, regex::Error> {
        Regex::new(source)?;
        Ok(Self { source: source.into(), anchored: Regex::new(&format!("^(?:{source})$"))? })
    }

    /// Whether it covers the whole text.
    pub fn is_match(&self, text: &str) -> bool {
        self.anchored.is_match(text)
    }

    /// The expression as it was given.
    pub fn as_str(&self) -> &str {
        &self.source
    }
}

impl PartialEq for FullRegex {
    fn eq(&self, other: &Self) -> bool {
        self.source == other.source
    }
}

impl StringMatch {
    /// Whether the text fits.
    pub fn is_match(&self, text: &str) -> bool {
        match self {
            Self::Exact(value) => **value == *text,
            Self::Regex(regex) => regex.is_match(text),
        }
    }
}
