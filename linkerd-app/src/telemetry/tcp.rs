//! Connections: `tcp_*` per label set, and bytes by zone, which are the sum of the former (metrics.md 5.6).

use super::{
    labels::Text,
    legacy::{Family, Sample},
    metric::{Counter, Gauge, SlotKey, Slots},
    store::{Metric, Series},
};
use crate::policy::endpoint::ZoneLocality;

/// Connections of one label set.
#[derive(Debug, Default)]
pub struct ConnMetrics {
    opened: Counter,
    open: Gauge,
    read: Counter,
    written: Counter,
    /// By errno; none = a clean close, or an error without a number.
    closed: Slots<Option<i32>, Counter>,
    /// Outbound connections to peers count for their zone.
    zone: Option<ZoneLocality>,
}

impl SlotKey for Option<i32> {
    /// No errno is negative; printed as `UNKNOWN_ERRNO`.
    const OTHER: Self = Some(-1);
}

impl ConnMetrics {
    pub(super) fn new(zone: Option<ZoneLocality>) -> Self {
        Self { zone, ..Self::default() }
    }

    /// A connection was accepted, or is established with TLS and transport header.
    pub fn open(&self) {
        self.opened.inc();
        self.open.add(1);
    }

    /// A connection ended, with the `errno` of the first failed I/O if there was one. Once per [`ConnMetrics::open`].
    pub fn close(&self, errno: Option<i32>) {
        self.open.add(-1);
        self.closed.get(errno, Counter::default).inc();
    }

    /// Bytes read from the peer.
    pub fn read(&self, n: u64) {
        self.read.add(n);
    }

    /// Bytes written to the peer.
    pub fn written(&self, n: u64) {
        self.written.add(n);
    }
}

impl Metric for ConnMetrics {
    fn version(&self) -> u64 {
        let closed: u64 = self.closed.iter().map(|(_, c)| c.get()).sum();
        self.opened.get() + self.read.get() + self.written.get() + closed
    }
}

/// Bytes to and from peers of one zone.
#[derive(Copy, Clone, Debug, Default)]
pub(super) struct ZoneBytes {
    pub(super) sent: u64,
    pub(super) received: u64,
}

/// By zone; what is counted of label sets that went stays in it.
#[derive(Copy, Clone, Debug, Default)]
pub(super) struct Zones {
    pub(super) local: Option<ZoneBytes>,
    pub(super) remote: Option<ZoneBytes>,
    pub(super) unknown: Option<ZoneBytes>,
}

impl Zones {
    pub(super) fn add(&mut self, conn: &ConnMetrics) {
        let bytes = match conn.zone {
            Some(ZoneLocality::Local) => &mut self.local,
            Some(ZoneLocality::Remote) => &mut self.remote,
            Some(ZoneLocality::Unknown) => &mut self.unknown,
            None => return,
        };
        let bytes = bytes.get_or_insert_default();
        bytes.sent += conn.written.get();
        bytes.received += conn.read.get();
    }

    /// Label value and bytes of the zones that connections were made to.
    pub(super) fn iter(&self) -> impl Iterator<Item = (&'static str, ZoneBytes)> {
        [("Local", self.local), ("Remote", self.remote), ("Unknown", self.unknown)]
            .into_iter()
            .filter_map(|(name, bytes)| Some((name, bytes?)))
    }
}

/// The five `tcp_*` families.
pub(super) fn encode(out: &mut String, series: &[Series<ConnMetrics>]) {
    let counter = |out: &mut String, name, help, value: fn(&ConnMetrics) -> u64| {
        let mut family = Family::counter(out, name, help);
        for s in series {
            family.value((&s.text).into(), value(&s.metric));
        }
    };
    counter(out, "tcp_open_total", "Connections opened.", |m| m.opened.get());
    let mut family = Family::gauge(out, "tcp_open_connections", "Connections open now.");
    for s in series {
        family.value((&s.text).into(), s.metric.open.get());
    }
    counter(out, "tcp_read_bytes_total", "Bytes read from peers.", |m| m.read.get());
    counter(out, "tcp_write_bytes_total", "Bytes written to peers.", |m| m.written.get());
    let mut family = Family::counter(out, "tcp_close_total", "Connections closed.");
    for s in series {
        for (errno, count) in s.metric.closed.iter() {
            let after = [("errno", Text::Str(errno.map_or("", errno_name)))];
            family.value(Sample { before: &[], base: &s.text, after: &after }, count.get());
        }
    }
}

/// The symbol of an errno of I/O on sockets.
pub fn errno_name(errno: i32) -> &'static str {
    match errno {
        libc::EPERM => "EPERM",
        libc::EINTR => "EINTR",
        libc::EIO => "EIO",
        libc::EBADF => "EBADF",
        libc::EAGAIN => "EAGAIN",
        libc::ENOMEM => "ENOMEM",
        libc::EACCES => "EACCES",
        libc::EFAULT => "EFAULT",
        libc::EINVAL => "EINVAL",
        libc::ENFILE => "ENFILE",
        libc::EMFILE => "EMFILE",
        libc::ENOSPC => "ENOSPC",
        libc::EPIPE => "EPIPE",
        libc::EPROTO => "EPROTO",
        libc::EBADMSG => "EBADMSG",
        libc::EOVERFLOW => "EOVERFLOW",
        libc::ENOTSOCK => "ENOTSOCK",
        libc::EMSGSIZE => "EMSGSIZE",
        libc::ENOPROTOOPT => "ENOPROTOOPT",
        libc::EPROTONOSUPPORT => "EPROTONOSUPPORT",
        libc::EOPNOTSUPP => "EOPNOTSUPP",
        libc::EAFNOSUPPORT => "EAFNOSUPPORT",
        libc::EADDRINUSE => "EADDRINUSE",
        libc::EADDRNOTAVAIL => "EADDRNOTAVAIL",
        libc::ENETDOWN => "ENETDOWN",
        libc::ENETUNREACH => "ENETUNREACH",
        libc::ENETRESET => "ENETRESET",
        libc::ECONNABORTED => "ECONNABORTED",
        libc::ECONNRESET => "ECONNRESET",
        libc::ENOBUFS => "ENOBUFS",
        libc::EISCONN => "EISCONN",
        libc::ENOTCONN => "ENOTCONN",
        libc::ESHUTDOWN => "ESHUTDOWN",
        libc::ETIMEDOUT => "ETIMEDOUT",
        libc::ECONNREFUSED => "ECONNREFUSED",
        libc::EHOSTDOWN => "EHOSTDOWN",
        libc::EHOSTUNREACH => "EHOSTUNREACH",
        libc::EALREADY => "EALREADY",
        libc::EINPROGRESS => "EINPROGRESS",
        libc::ECANCELED => "ECANCELED",
        _ => "UNKNOWN_ERRNO",
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;

    #[test]
    fn the_gauge_stays_after_the_close() {
        let conn = ConnMetrics::default();
        conn.open();
        conn.open();
        conn.read(10);
        conn.written(20);
        conn.close(None);
        conn.close(Some(libc::ECONNRESET));
        let mut out = String::new();
        encode(&mut out, &[Series { text: "peer=\"src\"".into(), last_value: 6, metric: Arc::new(conn) }]);
        let samples: Vec<_> = out.lines().filter(|l| !l.starts_with('#')).collect();
        assert_eq!(
            samples,
            [
                r#"tcp_open_total{peer="src"} 2"#,
                r#"tcp_open_connections{peer="src"} 0"#,
                r#"tcp_read_bytes_total{peer="src"} 10"#,
                r#"tcp_write_bytes_total{peer="src"} 20"#,
                r#"tcp_close_total{peer="src",errno=""} 1"#,
                r#"tcp_close_total{peer="src",errno="ECONNRESET"} 1"#,
            ]
        );
    }

    #[test]
    fn zones_add_up() {
        let mut zones = Zones::default();
        for _ in 0..2 {
            let conn = ConnMetrics::new(Some(ZoneLocality::Remote));
            conn.read(1);
            conn.written(2);
            zones.add(&conn);
        }
        zones.add(&ConnMetrics::default());
        let all: Vec<_> = zones.iter().map(|(name, b)| (name, b.sent, b.received)).collect();
        assert_eq!(all, [("Remote", 4, 2)]);
    }
}
