//! A name server for one zone that can change, over UDP (RFC 1035, RFC 2782).

use crate::net::Pod;
use std::{
    collections::BTreeMap,
    net::Ipv4Addr,
    sync::{Arc, Mutex},
};
use tokio::task::AbortHandle;

const A: u16 = 1;
const SRV: u16 = 33;
/// Seconds that answers hold.
const TTL: u32 = 5;

/// Ends on drop.
pub(crate) struct NameServer {
    records: Arc<Mutex<Records>>,
    task: AbortHandle,
}

/// Record data by name (lower case, with its last dot) and type.
type Records = BTreeMap<(String, u16), Vec<Vec<u8>>>;

impl NameServer {
    /// Serves in a pod.
    pub(crate) fn new(pod: &Pod) -> Self {
        let (socket, records) = (pod.udp(53), Arc::new(Mutex::new(Records::new())));
        let known = records.clone();
        let task = tokio::spawn(async move {
            let mut query = [0; 512];
            loop {
                let Ok((length, client)) = socket.recv_from(&mut query).await else { continue };
                let answer = answer(&query[..length], &known.lock().unwrap());
                let _ = socket.send_to(&answer, client).await;
            }
        });
        Self { records, task: task.abort_handle() }
    }

    pub(crate) fn addresses(&self, name: &str, ips: &[Ipv4Addr]) {
        self.set(name, A, ips.iter().map(|ip| ip.octets().to_vec()).collect());
    }

    /// Targets and ports; no longer any, if there are none.
    pub(crate) fn services(&self, name: &str, targets: &[(&str, u16)]) {
        let data = |(target, port): &(&str, u16)| {
            let mut data = vec![0, 0, 0, 1];
            data.extend(port.to_be_bytes());
            for label in target.trim_end_matches('.').split('.') {
                data.push(u8::try_from(label.len()).unwrap());
                data.extend(label.as_bytes());
            }
            data.push(0);
            data
        };
        self.set(name, SRV, targets.iter().map(data).collect());
    }

    fn set(&self, name: &str, kind: u16, data: Vec<Vec<u8>>) {
        self.records.lock().unwrap().insert((name.to_string(), kind), data);
    }
}

impl Drop for NameServer {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// The question is repeated; no such name is an answer, too.
fn answer(query: &[u8], records: &Records) -> Vec<u8> {
    let (mut name, mut at) = (String::new(), 12);
    while query[at] != 0 {
        let end = at + 1 + usize::from(query[at]);
        name.push_str(&String::from_utf8_lossy(&query[at + 1..end]).to_lowercase());
        name.push('.');
        at = end;
    }
    let end = at + 5;
    let kind = u16::from_be_bytes([query[at + 1], query[at + 2]]);
    let found = records.get(&(name, kind)).map_or(&[][..], Vec::as_slice);
    let mut out = query[..2].to_vec();
    out.extend([0x81, if found.is_empty() { 0x83 } else { 0x80 }, 0, 1]);
    out.extend(u16::try_from(found.len()).unwrap().to_be_bytes());
    out.extend([0; 4]);
    out.extend(&query[12..end]);
    for data in found {
        out.extend([0xc0, 12]);
        out.extend(kind.to_be_bytes());
        out.extend([0, 1]);
        out.extend(TTL.to_be_bytes());
        out.extend(u16::try_from(data.len()).unwrap().to_be_bytes());
        out.extend(data);
    }
    out
}
