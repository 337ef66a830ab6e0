//! The three header formats of a trace context that are read and written: W3C `traceparent`, gRPC's `grpc-trace-bin`, and
//! B3's several headers (behaviour.md F.2). `b3` in one header, `tracestate` and `baggage` pass untouched.

use base64::{
    Engine,
    alphabet::STANDARD,
    engine::{DecodePaddingMode, GeneralPurpose, GeneralPurposeConfig},
};
use http::{HeaderMap, HeaderName, HeaderValue};
use std::fmt::Write;

const TRACEPARENT: HeaderName = HeaderName::from_static("traceparent");
const GRPC_TRACE_BIN: HeaderName = HeaderName::from_static("grpc-trace-bin");
const B3_TRACE_ID: HeaderName = HeaderName::from_static("x-b3-traceid");
const B3_SPAN_ID: HeaderName = HeaderName::from_static("x-b3-spanid");
const B3_SAMPLED: HeaderName = HeaderName::from_static("x-b3-sampled");

/// The only version of `traceparent` that is known.
const VERSION: &str = "00";
/// The flag `sampled` of `traceparent` and `grpc-trace-bin`.
const SAMPLED: u8 = 1;

/// gRPC leaves the padding out, others write it; written with it, as the original does.
const BASE64: GeneralPurpose = GeneralPurpose::new(
    &STANDARD,
    GeneralPurposeConfig::new().with_decode_padding_mode(DecodePaddingMode::Indifferent),
);

/// Where a request stands in a trace.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub(super) struct Context {
    format: Format,
    pub(super) trace: [u8; 16],
    pub(super) parent: [u8; 8],
    flags: u8,
}

/// How it is said.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
enum Format {
    W3c,
    Grpc,
    B3,
}

impl Context {
    /// What the headers say, in the first format that says something. Ids of zeros say nothing.
    pub(super) fn read(headers: &HeaderMap) -> Option<Self> {
        let found = w3c(headers).or_else(|| grpc(headers)).or_else(|| b3(headers))?;
        Some(found)
    }

    /// Whether spans are wanted.
    pub(super) fn is_sampled(&self) -> bool {
        self.flags & SAMPLED != 0
    }

    /// Says the same in the same format, with another span in the place of the parent.
    pub(super) fn write(&self, span: [u8; 8], headers: &mut HeaderMap) {
        let (name, text) = match self.format {
            Format::W3c => {
                let flags = [self.flags];
                (TRACEPARENT, format!("{VERSION}-{}-{}-{}", hex(&self.trace), hex(&span), hex(&flags)))
            }
            Format::Grpc => (GRPC_TRACE_BIN, BASE64.encode(grpc_bytes(&self.trace, &span, self.flags))),
            Format::B3 => (B3_SPAN_ID, hex(&span)),
        };
        if let Ok(value) = HeaderValue::try_from(text) {
            headers.insert(name, value);
        }
    }

    fn of(format: Format, trace: [u8; 16], parent: [u8; 8], flags: u8) -> Option<Self> {
        (trace != [0; 16] && parent != [0; 8]).then_some(Self { format, trace, parent, flags })
    }
}

/// W3C Trace Context, 3.2: `00-<trace>-<parent>-<flags>`.
fn w3c(headers: &HeaderMap) -> Option<Context> {
    let mut parts = headers.get(TRACEPARENT)?.to_str().ok()?.split('-');
    if parts.next()? != VERSION {
        return None;
    }
    let (trace, parent, [flags]) = (unhex(parts.next()?)?, unhex(parts.next()?)?, unhex(parts.next()?)?);
    if parts.next().is_some() {
        return None;
    }
    Context::of(Format::W3c, trace, parent, flags)
}

/// A version byte, then fields: 0 and 16 bytes of trace id, 1 and 8 bytes of span id, 2 and a byte of flags. An unknown field
/// ends it, since its length is unknown.
fn grpc(headers: &HeaderMap) -> Option<Context> {
    let bytes = BASE64.decode(headers.get(GRPC_TRACE_BIN)?.as_bytes()).ok()?;
    let (mut trace, mut parent, mut flags) = (None, None, 0);
    let mut rest = bytes.get(1..)?;
    while let Some((field, value)) = rest.split_first() {
        let length = match field {
            0 => 16,
            1 => 8,
            2 => 1,
            _ => break,
        };
        let (value, after) = value.split_at_checked(length)?;
        match field {
            0 => trace = value.try_into().ok(),
            1 => parent = value.try_into().ok(),
            _ => flags = value.first().copied().unwrap_or(0),
        }
        rest = after;
    }
    Context::of(Format::Grpc, trace?, parent?, flags)
}

fn grpc_bytes(trace: &[u8; 16], span: &[u8; 8], flags: u8) -> Vec<u8> {
    [&[0, 0], &trace[..], &[1], span, &[2, flags]].concat()
}

/// Both ids are needed; sampled is exactly `1`.
fn b3(headers: &HeaderMap) -> Option<Context> {
    let id = |name| headers.get(name)?.to_str().ok();
    let sampled = headers.get(B3_SAMPLED).is_some_and(|value| value == "1");
    Context::of(Format::B3, unhex(id(B3_TRACE_ID)?)?, unhex(id(B3_SPAN_ID)?)?, u8::from(sampled))
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().fold(String::with_capacity(bytes.len() * 2), |mut text, byte| {
        // Writing to a String cannot fail.
        let _ = write!(text, "{byte:02x}");
        text
    })
}

/// Text that is too short is taken as if it had zeros before it.
fn unhex<const N: usize>(text: &str) -> Option<[u8; N]> {
    if text.is_empty() || text.len() > 2 * N {
        return None;
    }
    let mut bytes = [0; N];
    for (i, digit) in text.chars().rev().enumerate() {
        let digit = u8::try_from(digit.to_digit(16)?).ok()?;
        bytes[N - 1 - i / 2] |= digit << (4 * (i % 2));
    }
    Some(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    const TRACE: &str = "0af7651916cd43dd8448eb211c80319c";
    const PARENT: &str = "b7ad6b7169203331";
    const SPAN: [u8; 8] = [1, 2, 3, 4, 5, 6, 7, 8];

    fn headers(pairs: &[(&'static str, &str)]) -> HeaderMap {
        pairs.iter().map(|(k, v)| (HeaderName::from_static(k), HeaderValue::from_str(v).unwrap())).collect()
    }

    /// What is found (trace, parent, sampled), and what the headers are once `SPAN` is written.
    #[track_caller]
    fn check(before: &[(&'static str, &str)], found: Option<(&str, &str, bool)>, after: &[(&'static str, &str)]) {
        let mut map = headers(before);
        let context = Context::read(&map);
        let told = context.map(|c| (hex(&c.trace), hex(&c.parent), c.is_sampled()));
        assert_eq!(told, found.map(|(trace, parent, sampled)| (trace.into(), parent.into(), sampled)), "{before:?}");
        if let Some(context) = context {
            context.write(SPAN, &mut map);
        }
        assert_eq!(map, headers(after));
    }

    fn untouched(before: &[(&'static str, &str)]) {
        check(before, None, before);
    }

    #[test]
    fn traceparent() {
        let parent = |flags: &str| format!("00-{TRACE}-{PARENT}-{flags}");
        let written = |flags: &str| format!("00-{TRACE}-0102030405060708-{flags}");
        for (flags, sampled) in [("01", true), ("00", false), ("03", true), ("ff", true)] {
            let found = Some((TRACE, PARENT, sampled));
            check(&[("traceparent", &parent(flags))], found, &[("traceparent", &written(flags))]);
        }
        let padded = (&*format!("{:0>32}", "1a"), &*format!("{:0>16}", "2"), true);
        check(
            &[("traceparent", "00-1a-2-1")],
            Some(padded),
            &[("traceparent", &format!("00-{}-0102030405060708-01", padded.0))],
        );
        let zeros = "0".repeat(32);
        for bad in [
            &*parent("01").replacen("00", "01", 1),
            &format!("00-{zeros}-{PARENT}-01"),
            &format!("00-{TRACE}-{}-01", &zeros[..16]),
            &format!("00-{TRACE}-{PARENT}"),
            &format!("00-{TRACE}-{PARENT}-01-x"),
            &format!("00-{TRACE}0-{PARENT}-01"),
            &format!("00-{TRACE}-g-01"),
            "00--1-01",
            "",
        ] {
            untouched(&[("traceparent", bad)]);
        }
    }

    #[test]
    fn grpc_trace_bin() {
        let trace = unhex(TRACE).unwrap();
        let text = |span: &[u8; 8], flags| BASE64.encode(grpc_bytes(&trace, span, flags));
        let parent = unhex(PARENT).unwrap();
        for flags in [0, 1] {
            let found = Some((TRACE, PARENT, flags == 1));
            let written = text(&SPAN, flags);
            check(&[("grpc-trace-bin", &text(&parent, flags))], found, &[("grpc-trace-bin", &written)]);
            let unpadded = text(&parent, flags);
            check(&[("grpc-trace-bin", unpadded.trim_end_matches('='))], found, &[("grpc-trace-bin", &written)]);
        }
        // An unknown field ends it: what is needed came before, or not.
        let mut bytes = grpc_bytes(&trace, &parent, 1);
        bytes.extend([9, 9]);
        check(
            &[("grpc-trace-bin", &BASE64.encode(&bytes))],
            Some((TRACE, PARENT, true)),
            &[("grpc-trace-bin", &text(&SPAN, 1))],
        );
        for bad in [&BASE64.encode([0, 9]), &BASE64.encode(&bytes[..10]), &BASE64.encode([0]), "", "%"] {
            untouched(&[("grpc-trace-bin", bad)]);
        }
    }

    #[test]
    fn b3_headers() {
        let (short, long) = ("1a", &*format!("{:0>32}", "1a"));
        let rest = |sampled| [("x-b3-traceid", short), ("x-b3-parentspanid", "7"), ("x-b3-sampled", sampled)];
        for (sampled, wanted) in [("1", true), ("0", false), ("true", false)] {
            check(
                &[&rest(sampled)[..], &[("x-b3-spanid", PARENT)]].concat(),
                Some((long, PARENT, wanted)),
                &[&rest(sampled)[..], &[("x-b3-spanid", "0102030405060708")]].concat(),
            );
        }
        untouched(&[("x-b3-traceid", TRACE), ("x-b3-sampled", "1")]);
        untouched(&[("x-b3-spanid", PARENT)]);
        untouched(&[("b3", &format!("{TRACE}-{PARENT}-1")), ("tracestate", "a=b"), ("baggage", "c=d")]);
    }

    #[test]
    fn the_first_format_that_says_something_is_used() {
        let traceparent = format!("00-{TRACE}-{PARENT}-01");
        let b3 = [("x-b3-traceid", "1"), ("x-b3-spanid", "2")];
        let map = headers(&[&b3[..], &[("traceparent", &traceparent)]].concat());
        assert_eq!(Context::read(&map).unwrap().format, Format::W3c);
        let map = headers(&[&b3[..], &[("traceparent", "junk")]].concat());
        assert_eq!(Context::read(&map).unwrap().format, Format::B3);
    }
}
