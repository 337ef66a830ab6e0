//! The text of the rules: made from options, compared with what `iptables-save` prints, and turned into input for
//! `iptables-restore`. Nothing here touches the host.

use super::{Error, Options};
use ipnet::IpNet;
use std::{
    collections::{BTreeMap, BTreeSet},
    fmt::{self, Write},
};

/// Chain that PREROUTING jumps to.
pub(super) const INBOUND_CHAIN: &str = "PROXY_INIT_REDIRECT";
/// Chain that OUTPUT jumps to.
pub(super) const OUTBOUND_CHAIN: &str = "PROXY_INIT_OUTPUT";
/// Ports that one multiport match holds; a range counts twice (contract.md 6.1).
const MULTIPORT_SLOTS: usize = 15;

/// An address family.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub enum Family {
    /// IPv4.
    V4,
    /// IPv6.
    V6,
}

impl fmt::Display for Family {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::V4 => "IPv4",
            Self::V6 => "IPv6",
        })
    }
}

/// Ports from one to another, both included.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub struct PortRange {
    low: u16,
    high: u16,
}

impl PortRange {
    /// One port.
    pub fn single(port: u16) -> Self {
        Self { low: port, high: port }
    }

    fn slots(self) -> usize {
        if self.low == self.high { 1 } else { 2 }
    }
}

impl fmt::Display for PortRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.low == self.high { write!(f, "{}", self.low) } else { write!(f, "{}:{}", self.low, self.high) }
    }
}

/// Reads ports and ranges, separated by commas: `25,4567-4568`. Blanks and empty items are ignored.
///
/// # Errors
/// Names the list and the first bad item.
pub fn parse_ports(list: &'static str, text: &str) -> Result<Vec<PortRange>, Error> {
    items(text)
        .map(|item| {
            let (low, high) = item.split_once('-').unwrap_or((item, item));
            match (low.trim().parse::<u16>(), high.trim().parse::<u16>()) {
                (Ok(low), Ok(high)) if 0 < low && low <= high => Ok(PortRange { low, high }),
                _ => Err(Error::Ports { list, item: item.to_owned() }),
            }
        })
        .collect()
}

/// Reads networks, separated by commas. A bare address counts as a network of one.
///
/// # Errors
/// Names the list and the first bad item.
pub fn parse_subnets(list: &'static str, text: &str) -> Result<Vec<IpNet>, Error> {
    items(text)
        .map(|item| {
            item.parse::<IpNet>()
                .or_else(|_| item.parse::<std::net::IpAddr>().map(IpNet::from))
                .map_err(|_| Error::Subnet { list, item: item.to_owned() })
        })
        .collect()
}

fn items(text: &str) -> impl Iterator<Item = &str> {
    text.split(',').map(str::trim).filter(|item| !item.is_empty())
}

/// The rules of our two chains, each in the form and order in which `iptables-save` prints it, without `-A CHAIN`.
#[derive(Debug)]
pub(super) struct Chains {
    inbound: Vec<String>,
    outbound: Vec<String>,
}

/// The rules of contract.md 6.1.
pub(super) fn chains(options: &Options, family: Family) -> Chains {
    let mut inbound = Vec::new();
    ignore_ports(&mut inbound, &options.inbound_ports_to_ignore);
    let of_family = |net: &&IpNet| matches!((net, family), (IpNet::V4(_), Family::V4) | (IpNet::V6(_), Family::V6));
    for net in options.subnets_to_ignore.iter().filter(of_family).map(IpNet::trunc) {
        // The whole address space is no match at all, and is printed as none.
        let source = if net.prefix_len() == 0 { String::new() } else { format!("-s {net} ") };
        inbound.push(rule(&source, &format!("ignore-subnet-{net}"), "RETURN"));
    }
    let redirect = |port| format!("REDIRECT --to-ports {port}");
    let to_inbound = redirect(options.inbound_port);
    if options.inbound_ports.is_empty() {
        inbound.push(rule("-p tcp ", "redirect-all-incoming-to-proxy-port", &to_inbound));
    }
    for port in &options.inbound_ports {
        let id = format!("redirect-port-{port}-to-proxy-port");
        inbound.push(rule(&format!("-p tcp -m tcp --dport {port} "), &id, &to_inbound));
    }

    let mut outbound = Vec::new();
    if let Some(uid) = options.uid.filter(|uid| *uid > 0) {
        outbound.push(rule(&format!("-m owner --uid-owner {uid} "), "ignore-proxy-user-id", "RETURN"));
    }
    if let Some(gid) = options.gid.filter(|gid| *gid > 0) {
        outbound.push(rule(&format!("-m owner --gid-owner {gid} "), "ignore-proxy-group-id", "RETURN"));
    }
    outbound.push(rule("-o lo ", "ignore-loopback", "RETURN"));
    ignore_ports(&mut outbound, &options.outbound_ports_to_ignore);
    outbound.push(rule("-p tcp ", "redirect-all-outgoing-to-proxy-port", &redirect(options.outbound_port)));
    Chains { inbound, outbound }
}

fn rule(matches: &str, id: &str, target: &str) -> String {
    format!("{matches}-m comment --comment \"proxy-init/{id}\" -j {target}")
}

fn ignore_ports(rules: &mut Vec<String>, mut ranges: &[PortRange]) {
    while !ranges.is_empty() {
        let mut slots = 0;
        let fits = ranges.iter().take_while(|range| {
            slots += range.slots();
            slots <= MULTIPORT_SLOTS
        });
        let (now, later) = ranges.split_at(fits.count());
        let list = now.iter().map(PortRange::to_string).collect::<Vec<_>>().join(",");
        let matches = format!("-p tcp -m multiport --dports {list} ");
        rules.push(rule(&matches, &format!("ignore-port-{list}"), "RETURN"));
        ranges = later;
    }
}

/// The jumps into our chains: hook, chain, rule.
fn jumps() -> [(&'static str, &'static str, String); 2] {
    [
        ("PREROUTING", INBOUND_CHAIN, rule("", "install-proxy-init-prerouting", INBOUND_CHAIN)),
        ("OUTPUT", OUTBOUND_CHAIN, rule("", "install-proxy-init-output", OUTBOUND_CHAIN)),
    ]
}

/// What `iptables-save -t nat` printed, as far as it concerns us.
#[derive(Debug, Default)]
pub(super) struct Saved {
    chains: BTreeSet<String>,
    /// By chain, in order, without `-A CHAIN`.
    rules: BTreeMap<String, Vec<String>>,
}

impl Saved {
    pub(super) fn parse(text: &str) -> Self {
        let mut saved = Self::default();
        let mut nat = false;
        for line in text.lines().map(str::trim) {
            if let Some(table) = line.strip_prefix('*') {
                nat = table == "nat";
            } else if !nat {
                continue;
            } else if let Some(chain) = line.strip_prefix(':').and_then(|rest| rest.split_whitespace().next()) {
                saved.chains.insert(chain.to_owned());
            } else if let Some((chain, rule)) = line.strip_prefix("-A ").and_then(|rest| rest.split_once(' ')) {
                saved.rules.entry(chain.to_owned()).or_default().push(rule.to_owned());
            }
        }
        saved
    }

    pub(super) fn has(&self, chain: &str) -> bool {
        self.chains.contains(chain)
    }

    fn of(&self, chain: &str) -> &[String] {
        self.rules.get(chain).map_or(&[], Vec::as_slice)
    }

    /// Rules of a hook that lead into a chain of ours, whoever made them.
    fn jumps_to<'a>(&'a self, hook: &str, chain: &'a str) -> impl Iterator<Item = &'a String> {
        self.of(hook).iter().filter(move |rule| {
            let mut words = rule.split_whitespace();
            words.by_ref().any(|word| word == "-j" || word == "-g") && words.next() == Some(chain)
        })
    }
}

/// What is missing (`- `) and what should not be there (`+ `), line by line; empty if our chains are as wanted. Order
/// counts: one line that is out of place shows as both.
pub(super) fn differences(wanted: &Chains, saved: &Saved) -> Vec<String> {
    let mut lines = Vec::new();
    for (chain, wanted) in [(INBOUND_CHAIN, &wanted.inbound), (OUTBOUND_CHAIN, &wanted.outbound)] {
        let found = saved.of(chain);
        let same = |a: &String, b: &String| words(a) == words(b);
        for n in 0..wanted.len().max(found.len()) {
            match (wanted.get(n), found.get(n)) {
                (Some(wanted), Some(found)) if same(wanted, found) => {}
                (wanted, found) => {
                    lines.extend(wanted.map(|rule| format!("- -A {chain} {rule}")));
                    lines.extend(found.map(|rule| format!("+ -A {chain} {rule}")));
                }
            }
        }
    }
    for (hook, chain, rule) in jumps() {
        match saved.jumps_to(hook, chain).count() {
            0 => lines.push(format!("- -A {hook} {rule}")),
            1 => {}
            _ => lines.extend(saved.jumps_to(hook, chain).skip(1).map(|extra| format!("+ -A {hook} {extra}"))),
        }
    }
    lines
}

/// Tools differ in what they quote.
fn words(rule: &str) -> Vec<&str> {
    rule.split_whitespace().map(|word| word.trim_matches('"')).collect()
}

/// Input that makes our chains what is wanted, whatever they were, and leads into each of them once.
pub(super) fn apply(wanted: &Chains, saved: &Saved) -> String {
    // With --noflush, naming a chain of our own makes it or empties it.
    let mut input = format!("*nat\n:{INBOUND_CHAIN} - [0:0]\n:{OUTBOUND_CHAIN} - [0:0]\n");
    for (chain, rules) in [(INBOUND_CHAIN, &wanted.inbound), (OUTBOUND_CHAIN, &wanted.outbound)] {
        for rule in rules {
            line(&mut input, format_args!("-A {chain} {rule}"));
        }
    }
    for (hook, chain, rule) in jumps() {
        let mut found = saved.jumps_to(hook, chain);
        if found.next().is_none() {
            line(&mut input, format_args!("-A {hook} {rule}"));
        }
        for extra in found {
            line(&mut input, format_args!("-D {hook} {extra}"));
        }
    }
    input.push_str("COMMIT\n");
    input
}

/// Input that takes our chains and all that leads into them away; none if there are none.
pub(super) fn undo(saved: &Saved) -> Option<String> {
    let chains = [INBOUND_CHAIN, OUTBOUND_CHAIN].map(|chain| (chain, saved.has(chain)));
    if chains.iter().all(|(_, there)| !there) {
        return None;
    }
    let mut input = String::from("*nat\n");
    for (hook, chain, _) in jumps() {
        for rule in saved.jumps_to(hook, chain) {
            line(&mut input, format_args!("-D {hook} {rule}"));
        }
    }
    for (chain, _) in chains.iter().filter(|(_, there)| *there) {
        line(&mut input, format_args!("-F {chain}"));
    }
    for (chain, _) in chains.iter().filter(|(_, there)| *there) {
        line(&mut input, format_args!("-X {chain}"));
    }
    input.push_str("COMMIT\n");
    Some(input)
}

fn line(text: &mut String, line: fmt::Arguments<'_>) {
    writeln!(text, "{line}").expect("a String takes all that is written");
}
