//! From the control plane's messages to policy values: the only place that reads them.
//!
//! A message that can't be understood is an [`Invalid`] that names the field, never a guess. What is refused and what
//! is tolerated follows behaviour.md C.2, C.8 and D.4; each tolerance says so where it is made.

pub(crate) mod destination;
pub(crate) mod inbound;
pub(crate) mod meta;
pub(crate) mod outbound;
pub(crate) mod profile;
pub(crate) mod route;

use std::{fmt, time::Duration};

/// Longest duration that is taken literally. Longer ones mean "no limit" to whoever sent them, and adding them to a
/// clock would overflow.
const MAX_DURATION: Duration = Duration::from_secs(10 * 365 * 24 * 3600);

/// A message that can't be understood: which field, and why.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Invalid {
    /// `protocol.detect.http1.routes[2].rules[0].backends`; empty for the message itself.
    path: String,
    reason: String,
}

impl Invalid {
    pub(crate) fn new(reason: impl Into<String>) -> Self {
        Self { path: String::new(), reason: reason.into() }
    }

    /// The field that contains what is wrong.
    pub(crate) fn inside(mut self, field: &str) -> Self {
        match self.path.chars().next() {
            None => self.path = field.to_string(),
            Some('[') => self.path.insert_str(0, field),
            Some(_) => {
                self.path.insert(0, '.');
                self.path.insert_str(0, field);
            }
        }
        self
    }

    /// The position in the list that contains what is wrong.
    fn item(self, index: usize) -> Self {
        self.inside(&format!("[{index}]"))
    }
}

/// `field.path: reason`.
impl fmt::Display for Invalid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if !self.path.is_empty() {
            write!(f, "{}: ", self.path)?;
        }
        f.write_str(&self.reason)
    }
}

impl std::error::Error for Invalid {}

/// Names the field that a failure is in.
pub(crate) trait Inside<T> {
    /// The value, or the failure inside `field`.
    fn inside(self, field: &str) -> Result<T, Invalid>;
}

impl<T> Inside<T> for Result<T, Invalid> {
    fn inside(self, field: &str) -> Result<T, Invalid> {
        self.map_err(|invalid| invalid.inside(field))
    }
}

/// A field that must be there, converted.
pub(crate) fn required<T, U>(
    field: &str,
    value: Option<T>,
    convert: impl FnOnce(T) -> Result<U, Invalid>,
) -> Result<U, Invalid> {
    value.ok_or_else(|| Invalid::new("missing")).and_then(convert).inside(field)
}

/// A field that may be absent, converted.
pub(crate) fn optional<T, U>(
    field: &str,
    value: Option<T>,
    convert: impl FnOnce(T) -> Result<U, Invalid>,
) -> Result<Option<U>, Invalid> {
    value.map(convert).transpose().inside(field)
}

/// A list, converted; the first failure names its position.
pub(crate) fn list<T, U>(
    field: &str,
    values: Vec<T>,
    mut convert: impl FnMut(T) -> Result<U, Invalid>,
) -> Result<Vec<U>, Invalid> {
    let items = values.into_iter().enumerate();
    items.map(|(i, value)| convert(value).map_err(|invalid| invalid.item(i))).collect::<Result<_, _>>().inside(field)
}

/// A list that must not be empty, converted.
pub(crate) fn non_empty<T, U>(
    field: &str,
    values: Vec<T>,
    convert: impl FnMut(T) -> Result<U, Invalid>,
) -> Result<Vec<U>, Invalid> {
    if values.is_empty() {
        return Err(Invalid::new("empty").inside(field));
    }
    list(field, values, convert)
}

/// A duration: not negative, cut at ten years.
pub(crate) fn duration(value: prost_types::Duration) -> Result<Duration, Invalid> {
    let text = value.to_string();
    let duration =
        Duration::try_from(value).map_err(|_| Invalid::new(format!("{text} is negative or out of range")))?;
    Ok(duration.min(MAX_DURATION))
}

/// A limit in time that may be absent; zero is no limit, as in the Gateway API (GEP-1742).
pub(crate) fn limit(field: &str, value: Option<prost_types::Duration>) -> Result<Option<Duration>, Invalid> {
    Ok(optional(field, value, duration)?.filter(|limit| !limit.is_zero()))
}

/// A port; 0 is "none" where protobuf can't tell it from absent.
pub(crate) fn port(value: u32) -> Result<Option<u16>, Invalid> {
    match u16::try_from(value) {
        Ok(0) => Ok(None),
        Ok(port) => Ok(Some(port)),
        Err(_) => Err(Invalid::new(format!("{value} is no port"))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_read_like_the_message() {
        let invalid = list("routes", vec![1, 2], |n| if n == 2 { Err(Invalid::new("bad")) } else { Ok(n) })
            .inside("http1")
            .inside("protocol")
            .unwrap_err();
        assert_eq!(invalid.to_string(), "protocol.http1.routes[1]: bad");
        assert_eq!(required::<u8, u8>("x", None, Ok).unwrap_err().to_string(), "x: missing");
    }

    #[test]
    fn durations_are_bounded() {
        let proto = |seconds, nanos| prost_types::Duration { seconds, nanos };
        assert_eq!(duration(proto(1, 5)).unwrap(), Duration::new(1, 5));
        assert_eq!(duration(proto(i64::MAX, 0)).unwrap(), MAX_DURATION);
        assert!(duration(proto(-1, 0)).is_err());
        assert_eq!(limit("t", Some(proto(0, 0))).unwrap(), None);
        assert_eq!(port(0).unwrap(), None);
        assert!(port(65_536).is_err());
    }
}
