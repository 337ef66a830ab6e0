//! The three duration grammars that manifests use: GEP-2257 (Gateway API), Go (policy.linkerd.io kinds), and the single
//! whole number with one unit of Linkerd's annotations. Each returns what it refused and how to write it.

use std::time::Duration;

/// Longest duration taken from a manifest: about 285 years. Larger ones are refused, so that adding one to a clock
/// cannot overflow.
const LONGEST: Duration = Duration::from_secs(9_000_000_000);

/// GEP-2257: one to four parts of one to five digits and a unit of `h`, `m`, `s`, `ms`; the parts add up.
pub(super) fn gep2257(text: &str) -> Result<Duration, String> {
    let refuse = |why: &str| {
        Err(format!(
            "{text:?} is not a duration ({why}); write up to four whole numbers with h, m, s or ms, like 1h30m or 500ms"
        ))
    };
    let mut rest = text;
    let mut total = Duration::ZERO;
    let mut parts = 0;
    while !rest.is_empty() {
        let digits = rest.bytes().take_while(u8::is_ascii_digit).count();
        if digits == 0 {
            return refuse("a number is missing");
        }
        if digits > 5 {
            return refuse("more than five digits");
        }
        let number: u64 = rest[..digits].parse().unwrap_or(0);
        rest = &rest[digits..];
        let unit = rest.bytes().take_while(u8::is_ascii_alphabetic).count();
        let millis = match &rest[..unit] {
            "h" => 3_600_000,
            "m" => 60_000,
            "s" => 1_000,
            "ms" => 1,
            "" if rest.starts_with('.') => return refuse("fractions are not allowed"),
            "" => return refuse("a unit is missing"),
            _ => return refuse("unknown unit"),
        };
        rest = &rest[unit..];
        total += Duration::from_millis(number * millis);
        parts += 1;
    }
    match parts {
        0 => refuse("empty"),
        1..=4 => Ok(total),
        _ => refuse("more than four parts"),
    }
}

/// Go's grammar without a sign: decimal numbers, fractions allowed, each with a unit of `ns us µs ms s m h`; a bare `0`.
pub(super) fn go(text: &str) -> Result<Duration, String> {
    let refuse = |why: &str| {
        Err(format!("{text:?} is not a duration ({why}); write numbers with units, like 1h30m, 1.5s or 250ms"))
    };
    let mut rest = text;
    if rest == "0" {
        return Ok(Duration::ZERO);
    }
    if rest.is_empty() {
        return refuse("empty");
    }
    if rest.starts_with('-') {
        return refuse("negative");
    }
    let mut total = Duration::ZERO;
    while !rest.is_empty() {
        let length = rest.bytes().take_while(|b| b.is_ascii_digit() || *b == b'.').count();
        let Ok(number) = rest[..length].parse::<f64>() else { return refuse("a number is missing") };
        rest = &rest[length..];
        let unit = rest.find(|c: char| c.is_ascii_digit() || c == '.').unwrap_or(rest.len());
        let nanos = match &rest[..unit] {
            "ns" => 1.0,
            "us" | "µs" | "μs" => 1e3,
            "ms" => 1e6,
            "s" => 1e9,
            "m" => 60e9,
            "h" => 3_600e9,
            "" => return refuse("a unit is missing"),
            _ => return refuse("unknown unit"),
        };
        rest = &rest[unit..];
        let part = number * nanos;
        if !part.is_finite() || part > LONGEST.as_nanos() as f64 {
            return refuse("too long");
        }
        total += Duration::from_nanos_u128(part.round() as u128);
    }
    if total > LONGEST { refuse("too long") } else { Ok(total) }
}

/// Linkerd's annotations: one whole number directly followed by one unit of `ms s m h d`, or `0`; blanks around it are
/// trimmed (contract.md 1.0).
pub(super) fn linkerd(text: &str) -> Result<Duration, String> {
    let refuse = |why: &str| {
        Err(format!(
            "{text:?} is not a duration ({why}); write one whole number and one unit of ms, s, m, h, d, like 300ms"
        ))
    };
    let text = text.trim();
    if text == "0" {
        return Ok(Duration::ZERO);
    }
    let digits = text.bytes().take_while(u8::is_ascii_digit).count();
    let Ok(number) = text[..digits].parse::<u64>() else { return refuse("a whole number is missing") };
    let millis = match &text[digits..] {
        "ms" => 1,
        "s" => 1_000,
        "m" => 60_000,
        "h" => 3_600_000,
        "d" => 86_400_000,
        "" => return refuse("a unit is missing"),
        _ => return refuse("unknown unit or more than one part"),
    };
    match number.checked_mul(millis).map(Duration::from_millis) {
        Some(d) if d <= LONGEST => Ok(d),
        _ => refuse("too long"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check(parse: fn(&str) -> Result<Duration, String>, valid: &[(&str, u64)], invalid: &[&str]) {
        for (text, millis) in valid {
            assert_eq!(parse(text), Ok(Duration::from_millis(*millis)), "{text}");
        }
        for text in invalid {
            assert!(parse(text).is_err(), "{text:?} was taken as {:?}", parse(text));
        }
    }

    #[test]
    fn gateway_api_durations() {
        check(
            gep2257,
            &[
                ("0s", 0),
                ("0h0m0s", 0),
                ("1h", 3_600_000),
                ("500ms", 500),
                ("2h30m", 9_000_000),
                ("10s30m1h", 5_410_000),
                ("100ms200ms300ms", 600),
                ("99999h", 99_999 * 3_600_000),
            ],
            &["0", "1", "", "1m1", "1d", "1us", "1.5h", "-15m", "1h30m10s20ms50h", "999999h", "1 h", "h", "1H"],
        );
    }

    #[test]
    fn go_durations() {
        check(
            go,
            &[("0", 0), ("1h30m", 5_400_000), ("1.5s", 1_500), ("250ms", 250), ("2000us", 2), ("0s", 0)],
            &["", "1", "-1s", "1d", "s", ".s", "1..5s", "999999999999h", "1s1"],
        );
    }

    #[test]
    fn annotation_durations() {
        check(
            linkerd,
            &[("0", 0), ("300ms", 300), (" 2s ", 2_000), ("1d", 86_400_000)],
            &["", "5", "1h30m", "1.5s", "-1s", "1 s", "99999999999999999999s", "18446744073709551615d"],
        );
    }
}
