//! The command line of the original init program (contract.md 6.4), so that the same image can take its place.

use super::{Action, Error, Mode, Options, parse_ports, parse_subnets};
use std::time::Duration;

/// What the command line says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct InitFlags {
    /// What to redirect.
    pub options: Options,
    /// `plain` or `json`.
    pub log_format: String,
    /// Least level that is logged.
    pub log_level: String,
    /// Flags that are understood and have no effect, for a warning.
    pub ignored: Vec<String>,
}

/// Reads flags, without the program's name: `--name value`, `--name=value`, `-n value`, `-nvalue`; switches take a value
/// only after `=`. Lists may be given several times.
///
/// # Errors
/// When a flag is unknown, lacks its value, or has one that is no good; when the proxy's ports are not given.
pub fn parse_init_flags<I, S>(args: I) -> Result<InitFlags, Error>
where
    I: IntoIterator<Item = S>,
    S: Into<String>,
{
    let mut options = Options {
        inbound_port: 0,
        outbound_port: 0,
        uid: None,
        inbound_ports_to_ignore: Vec::new(),
        wait: false,
        ..Options::default()
    };
    let (mut inbound, mut outbound) = (None, None);
    let (mut mode, mut bin) = (String::new(), String::new());
    let mut flags = InitFlags {
        options: options.clone(),
        log_format: "plain".into(),
        log_level: "info".into(),
        ignored: Vec::new(),
    };

    let mut args = args.into_iter().map(Into::into);
    while let Some(arg) = args.next() {
        let (name, given) = split(&arg)?;
        let mut value = || {
            given
                .clone()
                .or_else(|| args.next())
                .ok_or_else(|| Error::Flag { flag: name.to_owned(), problem: "needs a value".into() })
        };
        match name {
            "incoming-proxy-port" => inbound = Some(number(name, &value()?, 1..=65_535)? as u16),
            "outgoing-proxy-port" => outbound = Some(number(name, &value()?, 1..=65_535)? as u16),
            "proxy-uid" => options.uid = u32::try_from(number(name, &value()?, -1..=i64::from(u32::MAX))?).ok(),
            "proxy-gid" => options.gid = u32::try_from(number(name, &value()?, -1..=i64::from(u32::MAX))?).ok(),
            "ports-to-redirect" => {
                for item in value()?.split(',').map(str::trim).filter(|item| !item.is_empty()) {
                    options.inbound_ports.push(number(name, item, 1..=65_535)? as u16);
                }
            }
            "inbound-ports-to-ignore" => {
                options.inbound_ports_to_ignore.extend(parse_ports("--inbound-ports-to-ignore", &value()?)?);
            }
            "outbound-ports-to-ignore" => {
                options.outbound_ports_to_ignore.extend(parse_ports("--outbound-ports-to-ignore", &value()?)?);
            }
            "subnets-to-ignore" => options.subnets_to_ignore.extend(parse_subnets("--subnets-to-ignore", &value()?)?),
            "netns" => options.netns = Some(value()?).filter(|path| !path.is_empty()).map(Into::into),
            "simulate" => options.action = if switch(name, given.as_deref())? { Action::DryRun } else { Action::Apply },
            "use-wait-flag" => options.wait = switch(name, given.as_deref())?,
            "ipv6" => options.ipv6 = switch(name, given.as_deref())?,
            "timeout-close-wait-secs" => {
                let seconds = number(name, &value()?, 0..=i64::from(i32::MAX))?;
                options.close_wait_timeout = (seconds > 0).then(|| Duration::from_secs(seconds.unsigned_abs()));
            }
            "iptables-mode" => mode = value()?,
            "firewall-bin-path" => bin = value()?,
            "firewall-save-bin-path" => {
                value()?;
                flags.ignored.push(format!("--{name}"));
            }
            "log-format" => flags.log_format = value()?,
            "log-level" => flags.log_level = value()?,
            _ => {
                let problem = "unknown flag; `linkerd-proxy redirect --help` lists what there is".into();
                return Err(Error::Flag { flag: arg, problem });
            }
        }
    }
    let port = |port: Option<u16>, name: &str| {
        port.ok_or_else(|| Error::Flag { flag: format!("--{name}"), problem: "must be given".into() })
    };
    options.inbound_port = port(inbound, "incoming-proxy-port")?;
    options.outbound_port = port(outbound, "outgoing-proxy-port")?;
    options.mode = Some(kind(&mode, &bin)?);
    flags.options = options;
    Ok(flags)
}

/// The long name and the value, if it is in the same word.
fn split(arg: &str) -> Result<(&str, Option<String>), Error> {
    if let Some(long) = arg.strip_prefix("--") {
        return Ok(match long.split_once('=') {
            Some((name, value)) => (name, Some(value.to_owned())),
            None => (long, None),
        });
    }
    let mut rest = arg.strip_prefix('-').unwrap_or_default().chars();
    let name = match rest.next() {
        Some('p') => "incoming-proxy-port",
        Some('o') => "outgoing-proxy-port",
        Some('u') => "proxy-uid",
        Some('g') => "proxy-gid",
        Some('r') => "ports-to-redirect",
        Some('w') => "use-wait-flag",
        _ => return Err(Error::Flag { flag: arg.to_owned(), problem: "not a flag".into() }),
    };
    let rest = rest.as_str();
    let value = rest.strip_prefix('=').unwrap_or(rest);
    Ok((name, (!rest.is_empty()).then(|| value.to_owned())))
}

fn number(flag: &str, text: &str, range: std::ops::RangeInclusive<i64>) -> Result<i64, Error> {
    text.trim().parse().ok().filter(|n| range.contains(n)).ok_or_else(|| Error::Flag {
        flag: format!("--{flag}"),
        problem: format!("{text:?} is no whole number from {} to {}", range.start(), range.end()),
    })
}

/// A switch's value, in the spellings that Go programs take.
fn switch(flag: &str, value: Option<&str>) -> Result<bool, Error> {
    match value {
        None | Some("true" | "True" | "TRUE" | "t" | "T" | "1") => Ok(true),
        Some("false" | "False" | "FALSE" | "f" | "F" | "0") => Ok(false),
        Some(other) => {
            let problem = format!("{other:?} is neither true nor false");
            Err(Error::Flag { flag: format!("--{flag}"), problem })
        }
    }
}

fn kind(mode: &str, bin: &str) -> Result<Mode, Error> {
    match mode {
        "legacy" => return Ok(Mode::Legacy),
        "nft" => return Ok(Mode::Nft),
        "plain" => return Ok(Mode::Plain),
        "" => {}
        other => {
            let problem = format!("{other:?} is none of legacy, nft, plain");
            return Err(Error::Flag { flag: "--iptables-mode".into(), problem });
        }
    }
    match bin {
        "" | "iptables-legacy" => Ok(Mode::Legacy),
        "iptables-nft" => Ok(Mode::Nft),
        "iptables" => Ok(Mode::Plain),
        other => {
            let problem = format!("{other:?} is none of iptables-legacy, iptables-nft, iptables");
            Err(Error::Flag { flag: "--firewall-bin-path".into(), problem })
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::redirect::PortRange;

    #[track_caller]
    fn refused(args: &[&str], words: &str) {
        let error = parse_init_flags(args.iter().copied()).unwrap_err().to_string();
        assert!(error.contains(words), "{error}");
    }

    #[test]
    fn what_the_injector_passes() {
        let flags = parse_init_flags(
            "--firewall-bin-path iptables-nft --firewall-save-bin-path iptables-nft-save --ipv6=false \
             --incoming-proxy-port 4143 --outgoing-proxy-port 4140 --proxy-uid 2102 \
             --inbound-ports-to-ignore 4190,4191,4567-4568 --outbound-ports-to-ignore 443,6443"
                .split_whitespace(),
        )
        .unwrap();
        let single = PortRange::single;
        let expected = Options {
            mode: Some(Mode::Nft),
            ipv6: false,
            wait: false,
            inbound_ports_to_ignore: parse_ports("", "4190,4191,4567-4568").unwrap(),
            outbound_ports_to_ignore: vec![single(443), single(6443)],
            ..Options::default()
        };
        assert_eq!(flags.options, expected);
        assert_eq!(flags.ignored, ["--firewall-save-bin-path"]);
    }

    #[test]
    fn every_spelling() {
        let args = [
            "-p4143",
            "-o=4140",
            "-u",
            "0",
            "-g",
            "7",
            "-r",
            "80,443",
            "-r=8080",
            "-w",
            "--simulate",
            "--netns",
            "/ns",
            "--subnets-to-ignore",
            "10.0.0.0/8, fd00::/8",
            "--timeout-close-wait-secs=30",
            "--iptables-mode",
            "plain",
            "--log-level",
            "debug",
            "--log-format=json",
        ];
        let flags = parse_init_flags(args).unwrap();
        let options = flags.options;
        assert_eq!(
            (options.inbound_port, options.outbound_port, options.uid, options.gid),
            (4143, 4140, Some(0), Some(7))
        );
        assert_eq!(options.inbound_ports, [80, 443, 8080]);
        assert_eq!(
            (options.wait, options.ipv6, options.action, options.mode),
            (true, true, Action::DryRun, Some(Mode::Plain))
        );
        assert_eq!(options.close_wait_timeout, Some(Duration::from_secs(30)));
        assert_eq!((options.subnets_to_ignore.len(), options.netns), (2, Some("/ns".into())));
        assert_eq!((flags.log_level.as_str(), flags.log_format.as_str()), ("debug", "json"));
    }

    #[test]
    fn bad_command_lines_are_refused_early() {
        refused(&["-o", "4140"], "--incoming-proxy-port: must be given");
        refused(&["-p", "70000"], "70000");
        refused(&["-p", "4143", "-o"], "needs a value");
        refused(&["-p", "4143", "-o", "4140", "--inbound-ports-to-ignore", "80,x"], "\"x\" is no port");
        refused(&["--subnets-to-ignore", "10.0.0.0/33"], "no network");
        refused(&["--ipv6=maybe"], "neither true nor false");
        refused(&["--unknown"], "unknown flag");
        refused(&["stray"], "not a flag");
        refused(&["-p", "1", "-o", "2", "--firewall-bin-path", "/bin/sh"], "none of iptables-legacy");
    }
}
