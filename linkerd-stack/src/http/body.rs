//! The body of every message in the proxy: one type, handed on without copying, and one error for all that can end it
//! early. A body that came from a client connection holds that connection's lease and gives it back when it ends.

use super::client::Lease;
use bytes::Bytes;
use http_body::{Body as _, Frame, SizeHint};
use http_body_util::BodyExt;
use hyper::body::Incoming;
use std::{
    any::Any,
    convert::Infallible,
    error::Error as StdError,
    fmt, io,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, ready},
};

/// A stream of data and, at its end, perhaps trailers. Dropped unfinished, it resets its HTTP/2 stream or closes its
/// HTTP/1 connection.
pub struct Body(Kind);

enum Kind {
    Empty,
    Full(Bytes),
    Incoming(Incoming),
    Leased(Incoming, Option<Lease>),
    Boxed(Pin<Box<dyn http_body::Body<Data = Bytes, Error = BodyError> + Send>>),
}

impl Body {
    /// No data.
    pub fn empty() -> Self {
        Self(Kind::Empty)
    }

    /// One piece of data; an empty one makes an empty body.
    pub fn full(data: impl Into<Bytes>) -> Self {
        let data = data.into();
        Self(if data.is_empty() { Kind::Empty } else { Kind::Full(data) })
    }

    /// Any other body, boxed unless it is a `Body` already.
    pub fn new<B>(body: B) -> Self
    where
        B: http_body::Body<Data = Bytes> + Send + 'static,
        B::Error: Into<BodyError>,
    {
        let mut slot = Some(body);
        if let Some(body) = (&mut slot as &mut dyn Any).downcast_mut::<Option<Self>>().and_then(Option::take) {
            return body;
        }
        match slot {
            Some(body) => Self(Kind::Boxed(Box::pin(body.map_err(Into::into)))),
            None => Self::empty(),
        }
    }

    /// A body that holds something, a client's connection in the first place. `lease` is given back once it has ended.
    pub(super) fn leased(body: Incoming, lease: Lease) -> Self {
        if body.is_end_stream() {
            lease.give_back();
            return Self::empty();
        }
        Self(Kind::Leased(body, Some(lease)))
    }

    /// Another body with the same content, if that costs nothing: only of bodies held in memory as one piece.
    pub fn try_clone(&self) -> Option<Self> {
        match &self.0 {
            Kind::Empty => Some(Self::empty()),
            Kind::Full(data) => Some(Self(Kind::Full(data.clone()))),
            Kind::Incoming(_) | Kind::Leased(..) | Kind::Boxed(_) => None,
        }
    }
}

impl Default for Body {
    fn default() -> Self {
        Self::empty()
    }
}

impl From<Incoming> for Body {
    fn from(body: Incoming) -> Self {
        // Without this a request that has no body costs a channel's worth of polling.
        Self(if body.is_end_stream() { Kind::Empty } else { Kind::Incoming(body) })
    }
}

impl From<Bytes> for Body {
    fn from(data: Bytes) -> Self {
        Self::full(data)
    }
}

impl fmt::Debug for Body {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self.0 {
            Kind::Empty => "Body::Empty",
            Kind::Full(_) => "Body::Full",
            Kind::Incoming(_) | Kind::Leased(..) => "Body::Incoming",
            Kind::Boxed(_) => "Body::Boxed",
        })
    }
}

impl http_body::Body for Body {
    type Data = Bytes;
    type Error = BodyError;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        match &mut self.0 {
            Kind::Empty => Poll::Ready(None),
            Kind::Full(data) => {
                let data = std::mem::take(data);
                self.0 = Kind::Empty;
                Poll::Ready(Some(Ok(Frame::data(data))))
            }
            Kind::Incoming(body) => Pin::new(body).poll_frame(cx).map_err(BodyError::from),
            Kind::Leased(body, lease) => {
                let frame = ready!(Pin::new(&mut *body).poll_frame(cx));
                match &frame {
                    Some(Err(_)) => *lease = None,
                    Some(Ok(_)) if !body.is_end_stream() => {}
                    Some(Ok(_)) | None => {
                        if let Some(lease) = lease.take() {
                            lease.give_back();
                        }
                    }
                }
                Poll::Ready(frame.map(|frame| frame.map_err(BodyError::from)))
            }
            Kind::Boxed(body) => body.as_mut().poll_frame(cx),
        }
    }

    fn is_end_stream(&self) -> bool {
        match &self.0 {
            Kind::Empty => true,
            Kind::Full(_) => false,
            Kind::Incoming(body) | Kind::Leased(body, _) => body.is_end_stream(),
            Kind::Boxed(body) => body.is_end_stream(),
        }
    }

    fn size_hint(&self) -> SizeHint {
        match &self.0 {
            Kind::Empty => SizeHint::with_exact(0),
            Kind::Full(data) => SizeHint::with_exact(data.len() as u64),
            Kind::Incoming(body) | Kind::Leased(body, _) => body.size_hint(),
            Kind::Boxed(body) => body.size_hint(),
        }
    }
}

/// Why a body ended early.
#[derive(Clone, Debug)]
pub enum BodyError {
    /// The HTTP/2 stream was reset, by either side.
    Reset(Reset),
    /// Reading or writing the connection failed.
    Io(Arc<io::Error>),
    /// The peer closed the connection inside the body.
    Incomplete,
    /// Something of the proxy ended it: a timeout, a limit. The codecs answer it with `INTERNAL_ERROR`, unless an
    /// `h2::Error` is among its sources.
    Other(Arc<dyn StdError + Send + Sync>),
}

impl BodyError {
    /// The reason of an HTTP/2 reset, if that is what it was.
    pub fn reset(&self) -> Option<h2::Reason> {
        match self {
            Self::Reset(reset) => Some(reset.reason()),
            Self::Io(_) | Self::Incomplete | Self::Other(_) => None,
        }
    }

    /// An error of the proxy's own making.
    pub fn other(error: impl Into<Box<dyn StdError + Send + Sync>>) -> Self {
        let error = error.into();
        match error.downcast::<Self>() {
            Ok(error) => *error,
            Err(error) => Self::Other(error.into()),
        }
    }
}

impl fmt::Display for BodyError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Reset(reset) => reset.fmt(f),
            Self::Io(error) => error.fmt(f),
            Self::Incomplete => f.write_str("connection closed before the body was complete"),
            Self::Other(error) => error.fmt(f),
        }
    }
}

impl StdError for BodyError {
    /// What the HTTP/2 codec looks at to choose the reason of its own reset.
    fn source(&self) -> Option<&(dyn StdError + 'static)> {
        match self {
            Self::Reset(reset) => Some(reset),
            Self::Io(error) => Some(&**error),
            Self::Incomplete => None,
            Self::Other(error) => Some(&**error),
        }
    }
}

impl From<hyper::Error> for BodyError {
    fn from(error: hyper::Error) -> Self {
        let h2 = source::<h2::Error>(&error);
        if let Some(reason) = h2.and_then(h2::Error::reason) {
            return Self::Reset(Reset::new(reason));
        }
        if let Some(io) = h2.and_then(h2::Error::get_io).or_else(|| source(&error)) {
            return match io.kind() {
                // What the HTTP/1 decoder makes of an end before the announced length or the last chunk.
                io::ErrorKind::UnexpectedEof => Self::Incomplete,
                _ => Self::Io(Arc::new(copy_io(io))),
            };
        }
        if error.is_incomplete_message() { Self::Incomplete } else { Self::Other(Arc::new(error)) }
    }
}

impl From<io::Error> for BodyError {
    fn from(error: io::Error) -> Self {
        Self::Io(Arc::new(error))
    }
}

impl From<Reset> for BodyError {
    fn from(reset: Reset) -> Self {
        Self::Reset(reset)
    }
}

impl From<Box<dyn StdError + Send + Sync>> for BodyError {
    fn from(error: Box<dyn StdError + Send + Sync>) -> Self {
        Self::other(error)
    }
}

impl From<Infallible> for BodyError {
    fn from(never: Infallible) -> Self {
        match never {}
    }
}

/// An end without an answer: `RST_STREAM` with this reason on HTTP/2, a closed connection on HTTP/1.
pub struct Reset {
    reason: h2::Reason,
    /// The same, in the type that the HTTP/2 codec searches an error's sources for.
    error: h2::Error,
}

impl Reset {
    /// Resets with `reason`.
    pub fn new(reason: h2::Reason) -> Self {
        Self { reason, error: reason.into() }
    }

    /// Why.
    pub fn reason(&self) -> h2::Reason {
        self.reason
    }
}

impl Clone for Reset {
    fn clone(&self) -> Self {
        Self::new(self.reason)
    }
}

impl From<h2::Reason> for Reset {
    fn from(reason: h2::Reason) -> Self {
        Self::new(reason)
    }
}

impl fmt::Debug for Reset {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Reset").field(&self.reason).finish()
    }
}

impl fmt::Display for Reset {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "stream reset: {}", self.reason)
    }
}

impl StdError for Reset {
    fn source(&self) -> Option<&(dyn StdError + 'static)> {
        Some(&self.error)
    }
}

/// The first error of type `E` behind `error`.
pub(super) fn source<'e, E: StdError + 'static>(error: &'e (dyn StdError + 'static)) -> Option<&'e E> {
    let mut next = error.source();
    while let Some(error) = next {
        if let Some(found) = error.downcast_ref() {
            return Some(found);
        }
        next = error.source();
    }
    None
}

/// An `io::Error` can't be cloned; its number or its text can.
pub(super) fn copy_io(error: &io::Error) -> io::Error {
    match error.raw_os_error() {
        Some(errno) => io::Error::from_raw_os_error(errno),
        None => io::Error::new(error.kind(), error.to_string()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn full_bodies_end_after_their_data() {
        let mut body = Body::full("abc");
        assert_eq!(body.size_hint().exact(), Some(3));
        assert!(!body.is_end_stream());
        let frame = body.frame().await.unwrap().unwrap();
        assert_eq!(frame.into_data().unwrap(), "abc");
        assert!(body.is_end_stream());
        assert!(body.frame().await.is_none());
        assert!(Body::full("").is_end_stream());
    }

    #[tokio::test]
    async fn a_body_is_not_boxed_twice_and_errors_keep_their_reason() {
        assert!(Body::new(Body::full("x")).try_clone().is_some());
        let failing = http_body_util::StreamBody::new(futures_util::stream::iter([Err::<Frame<Bytes>, BodyError>(
            BodyError::Reset(Reset::new(h2::Reason::ENHANCE_YOUR_CALM)),
        )]));
        let mut body = Body::new(failing);
        assert!(body.try_clone().is_none());
        let error = body.frame().await.unwrap().unwrap_err();
        assert_eq!(error.reset(), Some(h2::Reason::ENHANCE_YOUR_CALM));
        assert_eq!(source::<h2::Error>(&error).unwrap().reason(), Some(h2::Reason::ENHANCE_YOUR_CALM));
        let boxed: Box<dyn StdError + Send + Sync> = Box::new(error);
        assert_eq!(BodyError::other(boxed).reset(), Some(h2::Reason::ENHANCE_YOUR_CALM));
    }
}
