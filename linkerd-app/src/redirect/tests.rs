//! Rule text as people will read it, and the real thing in a network namespace of its own.

use super::{rules::Saved, *};
use std::process::Command;

#[track_caller]
fn check_text(options: &Options, family: Family, expected: &str) {
    let text = rules::apply(&rules::chains(options, family), &Saved::default());
    let expected: String = expected.lines().map(|line| line.trim().to_owned() + "\n").skip(1).collect();
    assert_eq!(text, expected.trim_end().to_owned() + "\n");
}

fn all() -> Options {
    Options {
        gid: Some(2103),
        inbound_ports_to_ignore: parse_ports("", "4190,4191,4567-4568").unwrap(),
        outbound_ports_to_ignore: parse_ports("", "443").unwrap(),
        subnets_to_ignore: parse_subnets("", "10.1.2.3/8, fd00::/8, 192.0.2.7, 0.0.0.0/0").unwrap(),
        ..Options::default()
    }
}

#[test]
fn everything_redirected() {
    check_text(
        &all(),
        Family::V4,
        r#"
        *nat
        :PROXY_INIT_REDIRECT - [0:0]
        :PROXY_INIT_OUTPUT - [0:0]
        -A PROXY_INIT_REDIRECT -p tcp -m multiport --dports 4190,4191,4567:4568 -m comment --comment "proxy-init/ignore-port-4190,4191,4567:4568" -j RETURN
        -A PROXY_INIT_REDIRECT -s 10.0.0.0/8 -m comment --comment "proxy-init/ignore-subnet-10.0.0.0/8" -j RETURN
        -A PROXY_INIT_REDIRECT -s 192.0.2.7/32 -m comment --comment "proxy-init/ignore-subnet-192.0.2.7/32" -j RETURN
        -A PROXY_INIT_REDIRECT -m comment --comment "proxy-init/ignore-subnet-0.0.0.0/0" -j RETURN
        -A PROXY_INIT_REDIRECT -p tcp -m comment --comment "proxy-init/redirect-all-incoming-to-proxy-port" -j REDIRECT --to-ports 4143
        -A PROXY_INIT_OUTPUT -m owner --uid-owner 2102 -m comment --comment "proxy-init/ignore-proxy-user-id" -j RETURN
        -A PROXY_INIT_OUTPUT -m owner --gid-owner 2103 -m comment --comment "proxy-init/ignore-proxy-group-id" -j RETURN
        -A PROXY_INIT_OUTPUT -o lo -m comment --comment "proxy-init/ignore-loopback" -j RETURN
        -A PROXY_INIT_OUTPUT -p tcp -m multiport --dports 443 -m comment --comment "proxy-init/ignore-port-443" -j RETURN
        -A PROXY_INIT_OUTPUT -p tcp -m comment --comment "proxy-init/redirect-all-outgoing-to-proxy-port" -j REDIRECT --to-ports 4140
        -A PREROUTING -m comment --comment "proxy-init/install-proxy-init-prerouting" -j PROXY_INIT_REDIRECT
        -A OUTPUT -m comment --comment "proxy-init/install-proxy-init-output" -j PROXY_INIT_OUTPUT
        COMMIT"#,
    );
}

#[test]
fn listed_ports_and_no_user() {
    let options = Options {
        uid: Some(0),
        inbound_ports: vec![80, 8080],
        inbound_ports_to_ignore: Vec::new(),
        subnets_to_ignore: parse_subnets("", "10.0.0.0/8,fd00::/8").unwrap(),
        ..Options::default()
    };
    check_text(
        &options,
        Family::V6,
        r#"
        *nat
        :PROXY_INIT_REDIRECT - [0:0]
        :PROXY_INIT_OUTPUT - [0:0]
        -A PROXY_INIT_REDIRECT -s fd00::/8 -m comment --comment "proxy-init/ignore-subnet-fd00::/8" -j RETURN
        -A PROXY_INIT_REDIRECT -p tcp -m tcp --dport 80 -m comment --comment "proxy-init/redirect-port-80-to-proxy-port" -j REDIRECT --to-ports 4143
        -A PROXY_INIT_REDIRECT -p tcp -m tcp --dport 8080 -m comment --comment "proxy-init/redirect-port-8080-to-proxy-port" -j REDIRECT --to-ports 4143
        -A PROXY_INIT_OUTPUT -o lo -m comment --comment "proxy-init/ignore-loopback" -j RETURN
        -A PROXY_INIT_OUTPUT -p tcp -m comment --comment "proxy-init/redirect-all-outgoing-to-proxy-port" -j REDIRECT --to-ports 4140
        -A PREROUTING -m comment --comment "proxy-init/install-proxy-init-prerouting" -j PROXY_INIT_REDIRECT
        -A OUTPUT -m comment --comment "proxy-init/install-proxy-init-output" -j PROXY_INIT_OUTPUT
        COMMIT"#,
    );
    assert!(warnings(&options)[0].contains("no user id above 0"));
    assert!(warnings(&Options::default()).is_empty());
}

#[test]
fn multiport_matches_hold_fifteen_slots() {
    let list = |ports: &str| {
        let options = Options { inbound_ports_to_ignore: parse_ports("", ports).unwrap(), ..Options::default() };
        let text = rules::apply(&rules::chains(&options, Family::V4), &Saved::default());
        let lists = text.lines().filter_map(|line| line.split_once("--dports ")?.1.split(' ').next());
        lists.map(|list| list.split(',').count()).collect::<Vec<_>>()
    };
    let singles = (1..=31).map(|n| n.to_string()).collect::<Vec<_>>().join(",");
    assert_eq!(list(&singles), [15, 15, 1]);
    let ranges = (1..=8).map(|n| format!("{n}00-{n}50")).collect::<Vec<_>>().join(",");
    assert_eq!(list(&ranges), [7, 1]);
    assert_eq!(list(""), [0; 0]);
}

#[test]
fn ports_and_subnets_that_are_none_are_named() {
    for (text, item) in [("80,http", "http"), ("0", "0"), ("9-8", "9-8"), ("1-2-3", "1-2-3"), ("70000", "70000")] {
        let error = parse_ports("--skip", text).unwrap_err().to_string();
        assert!(error.starts_with("--skip") && error.contains(item), "{error}");
    }
    assert_eq!(parse_ports("", " 80 , 90 - 91,, ").unwrap().len(), 2);
    assert!(parse_subnets("--nets", "10.0.0.0/8,lan").unwrap_err().to_string().contains("lan"));
    let zero = Options { inbound_port: 0, ..Options::default() };
    assert!(matches!(run(&zero), Err(Error::ProxyPort("inbound port"))));
}

#[test]
fn applying_and_undoing_start_from_what_is_there() {
    let wanted = rules::chains(&Options::default(), Family::V4);
    let text = rules::apply(&wanted, &Saved::default());
    assert!(rules::differences(&wanted, &Saved::parse(&text)).is_empty());
    assert_eq!(rules::differences(&wanted, &Saved::default()).len(), 7);

    // Rules of another release: a port more, a jump twice, and a chain of someone else's.
    let found = text.replace("4190,4191", "4190,4191,9990").replace(
        "COMMIT",
        "-A PREROUTING -m comment --comment \"proxy-init/x/1\" -j PROXY_INIT_REDIRECT\n-A OUTPUT -j KUBE-SERVICES\nCOMMIT",
    );
    let saved = Saved::parse(&found);
    assert_eq!(rules::differences(&wanted, &saved).len(), 3);
    let again = rules::apply(&wanted, &saved);
    assert!(!again.contains("-A PREROUTING") && !again.contains("-A OUTPUT") && !again.contains("KUBE"), "{again}");
    assert!(
        again.contains("-D PREROUTING -m comment --comment \"proxy-init/x/1\" -j PROXY_INIT_REDIRECT\n"),
        "{again}"
    );

    let undone = rules::undo(&saved).unwrap();
    assert_eq!(undone.matches("-D PREROUTING").count(), 2);
    assert_eq!(undone.matches("-X ").count(), 2);
    assert!(!undone.contains("KUBE"));
    assert_eq!(rules::undo(&Saved::default()), None);
}

/// A network namespace that is deleted at the end; none without root or tools, which CI may not lack.
struct Netns(String);

impl Netns {
    fn new(name: &str) -> Option<Self> {
        let name = format!("l5d-{name}-{}", std::process::id());
        let made = Command::new("ip").args(["netns", "add", &name]).output();
        match made {
            Ok(output)
                if output.status.success() && Runner::new(None).is_ok_and(|r| r.tools(Family::V4, None).is_ok()) =>
            {
                Some(Self(name))
            }
            other => {
                let reason = other.map_or_else(|e| e.to_string(), |o| String::from_utf8_lossy(&o.stderr).into_owned());
                assert!(std::env::var_os("CI").is_none(), "CI must have root, ip and iptables: {reason}");
                eprintln!("skipped: no network namespace or no iptables here: {reason}");
                None
            }
        }
    }

    fn options(&self, action: Action, mode: Option<Mode>) -> Options {
        Options { action, mode, netns: Some(format!("/var/run/netns/{}", self.0).into()), ..all() }
    }

    fn sh(&self, line: &str) -> String {
        let output = Command::new("ip").args(["netns", "exec", &self.0, "sh", "-c", line]).output().unwrap();
        assert!(output.status.success(), "{line}: {}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8_lossy(&output.stdout).into_owned()
    }
}

impl Drop for Netns {
    fn drop(&mut self) {
        let _ = Command::new("ip").args(["netns", "del", &self.0]).output();
    }
}

fn outcomes(options: &Options) -> Vec<Outcome> {
    run(options).unwrap().families.into_iter().map(|family| family.outcome).collect()
}

/// Applies, applies again, changes, checks and undoes, beside a rule of someone else's.
fn life(name: &str, mode: Mode) {
    let Some(netns) = Netns::new(name) else { return };
    let tool = if mode == Mode::Legacy { "iptables-legacy" } else { "iptables-nft" };
    netns.sh(&format!("{tool} -t nat -N KUBE-SERVICES && {tool} -t nat -A OUTPUT -j KUBE-SERVICES"));
    let outcomes = |action| outcomes(&netns.options(action, Some(mode)));
    assert_eq!(outcomes(Action::Check), [Outcome::Absent, Outcome::Absent]);
    assert!(outcomes(Action::DryRun).iter().all(|o| matches!(o, Outcome::DryRun { .. })));
    assert_eq!(outcomes(Action::Check), [Outcome::Absent, Outcome::Absent]);
    assert!(outcomes(Action::Apply).iter().all(|o| matches!(o, Outcome::Applied(_))));
    assert!(outcomes(Action::Apply).iter().all(|o| matches!(o, Outcome::InForce(_))));
    assert!(outcomes(Action::Check).iter().all(|o| matches!(o, Outcome::InForce(_))));

    netns.sh(&format!(
        "{tool} -t nat -D PROXY_INIT_OUTPUT -o lo -m comment --comment proxy-init/ignore-loopback -j RETURN"
    ));
    match &outcomes(Action::Check)[..] {
        [Outcome::Differs(lines), Outcome::InForce(_)] => assert!(lines[0].contains("ignore-loopback"), "{lines:?}"),
        other => panic!("{other:?}"),
    }
    assert!(!run(&netns.options(Action::Check, Some(mode))).unwrap().is_as_asked(Action::Check));
    assert!(matches!(outcomes(Action::Apply)[..], [Outcome::Applied(_), Outcome::InForce(_)]));
    assert!(outcomes(Action::Check).iter().all(|o| matches!(o, Outcome::InForce(_))));
    let saved = netns.sh(&format!("{tool}-save -t nat"));
    assert_eq!(saved.matches("-j PROXY_INIT_OUTPUT").count(), 1, "{saved}");
    assert!(saved.contains("-A OUTPUT -j KUBE-SERVICES"), "{saved}");

    assert!(outcomes(Action::Undo).iter().all(|o| matches!(o, Outcome::Removed(_))));
    assert_eq!(outcomes(Action::Undo), [Outcome::Absent, Outcome::Absent]);
    let saved = netns.sh(&format!("{tool}-save -t nat"));
    assert!(!saved.contains("PROXY_INIT") && saved.contains("-A OUTPUT -j KUBE-SERVICES"), "{saved}");
}

#[test]
fn rules_live_and_go_with_nft() {
    life("nft", Mode::Nft);
}

#[test]
fn rules_of_other_tools_are_replaced() {
    let Some(netns) = Netns::new("switch") else { return };
    let legacy = outcomes(&netns.options(Action::Apply, Some(Mode::Legacy)));
    if legacy != [Outcome::Applied("iptables-legacy".into()), Outcome::Applied("ip6tables-legacy".into())] {
        eprintln!("skipped: this kernel has no legacy tables: {legacy:?}");
        return;
    }
    outcomes(&netns.options(Action::Apply, Some(Mode::Nft)));
    assert!(!netns.sh("iptables-legacy-save -t nat").contains("PROXY_INIT"));
    assert!(netns.sh("iptables-nft-save -t nat").contains("PROXY_INIT"));
    drop(netns);
    life("legacy", Mode::Legacy);
}
