//! Sticky sessions (GEP-1619): a token names the replica that answered first, and when the session began. The token
//! binds to a replica only while it is among the backend's own; anything else in it is ignored.

use crate::policy::client::{Session, SessionToken};
use http::{HeaderMap, HeaderValue, header};
use std::{
    net::{IpAddr, SocketAddr},
    time::{Duration, SystemTime, UNIX_EPOCH},
};

/// What a request's token says.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub(super) struct Token {
    pub(super) addr: SocketAddr,
    /// Seconds since the epoch.
    began: u64,
}

fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or(Duration::ZERO).as_secs()
}

impl Token {
    /// A session that begins now.
    pub(super) fn begin(addr: SocketAddr) -> Self {
        Self { addr, began: now() }
    }

    /// The token of a request, unless its session is over.
    pub(super) fn of(session: &Session, headers: &HeaderMap) -> Option<Self> {
        let text = match &session.token {
            SessionToken::Header(name) => headers.get(name)?.to_str().ok()?,
            SessionToken::Cookie { name, .. } => {
                headers
                    .get_all(header::COOKIE)
                    .iter()
                    .filter_map(|v| v.to_str().ok())
                    .flat_map(|v| v.split(';'))
                    .filter_map(|pair| pair.trim().split_once('='))
                    .find(|(key, _)| *key == &**name)?
                    .1
            }
        };
        let token = Self::parse(text)?;
        let age = Duration::from_secs(now().saturating_sub(token.began));
        (session.absolute_timeout.is_none_or(|limit| age < limit)).then_some(token)
    }

    /// Hexadecimal: seconds, port, address.
    fn parse(text: &str) -> Option<Self> {
        let (began, rest) = text.split_at_checked(16)?;
        let (port, ip) = rest.split_at_checked(4)?;
        let port = u16::from_str_radix(port, 16).ok()?;
        let ip = match ip.len() {
            8 => IpAddr::from(u32::from_str_radix(ip, 16).ok()?.to_be_bytes()),
            32 => IpAddr::from(u128::from_str_radix(ip, 16).ok()?.to_be_bytes()),
            _ => return None,
        };
        Some(Self { addr: SocketAddr::new(ip, port), began: u64::from_str_radix(began, 16).ok()? })
    }

    fn text(&self) -> String {
        let Self { addr, began } = self;
        match addr.ip() {
            IpAddr::V4(ip) => format!("{began:016x}{:04x}{:08x}", addr.port(), u32::from(ip)),
            IpAddr::V6(ip) => format!("{began:016x}{:04x}{:032x}", addr.port(), u128::from(ip)),
        }
    }

    /// Hands the token out with a response.
    pub(super) fn give(&self, session: &Session, headers: &mut HeaderMap) {
        let text = self.text();
        match &session.token {
            SessionToken::Header(name) => {
                if let Ok(value) = HeaderValue::try_from(text) {
                    headers.insert(name, value);
                }
            }
            SessionToken::Cookie { name, path, permanent } => {
                let mut cookie = format!("{name}={text}; Path={path}; HttpOnly");
                if let Some(limit) = session.absolute_timeout.filter(|_| *permanent) {
                    cookie.push_str(&format!("; Max-Age={}", limit.as_secs()));
                }
                if let Ok(value) = HeaderValue::try_from(cookie) {
                    headers.append(header::SET_COOKIE, value);
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn session(token: SessionToken) -> Session {
        Session { token, absolute_timeout: Some(Duration::from_secs(60)) }
    }

    #[track_caller]
    fn check(session: &Session, addr: &str) {
        let token = Token::begin(addr.parse().unwrap());
        let mut rsp = HeaderMap::new();
        token.give(session, &mut rsp);
        let mut req = HeaderMap::new();
        match &session.token {
            SessionToken::Header(name) => {
                req.insert(name, rsp[name].clone());
            }
            SessionToken::Cookie { .. } => {
                let cookie = rsp["set-cookie"].to_str().unwrap();
                assert!(cookie.ends_with("; Path=/a; HttpOnly; Max-Age=60"), "{cookie}");
                let pair = cookie.split(';').next().unwrap();
                req.insert("cookie", format!("x=y; {pair}; z").parse().unwrap());
            }
        }
        assert_eq!(Token::of(session, &req), Some(token));
    }

    #[test]
    fn tokens_come_back() {
        let cookie = session(SessionToken::Cookie { name: "s".into(), path: "/a".into(), permanent: true });
        let header = session(SessionToken::Header("x-s".parse().unwrap()));
        for addr in ["10.0.0.1:80", "[2001:db8::1]:65535"] {
            check(&cookie, addr);
            check(&header, addr);
        }
    }

    #[test]
    fn old_and_foreign_tokens_are_nothing() {
        let session = session(SessionToken::Header("x-s".parse().unwrap()));
        let of = |value: &str| {
            let mut headers = HeaderMap::new();
            headers.insert("x-s", value.parse().unwrap());
            Token::of(&session, &headers)
        };
        let old = Token { addr: ([1, 2, 3, 4], 5).into(), began: now() - 61 };
        assert_eq!(of(&old.text()), None);
        for bad in ["", "zz", "00000000000000000050", "0000000000000000005001020304ff"] {
            assert_eq!(of(bad), None, "{bad}");
        }
    }
}
