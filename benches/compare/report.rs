//! The report, as Markdown tables and a plot. Figures of one run are comparable among themselves only, so ratios and
//! the targets, which are ratios too, stand beside them.

use crate::{
    proxies::Name,
    run::{Measured, Results},
    work::{Unit, Work},
};
use std::{collections::BTreeMap, fmt::Write as _, fs, time::Duration};

const NAMES: [Name; 3] = [Name::Ours, Name::Haproxy, Name::Envoy];
/// The work at a constant rate.
const RATE: &str = "http1-rate";
const COLORS: [&str; 3] = ["#2b6cb0", "#718096", "#b794f4"];

pub(crate) fn markdown(results: &Results, works: &[&'static Work]) -> String {
    let mut text = String::new();
    // Writing to a String cannot fail.
    let _ = head(&mut text, results)
        .and_then(|()| cost(&mut text, results, works))
        .and_then(|()| detail(&mut text, results, works))
        .and_then(|()| rest(&mut text, results));
    text
}

fn head(text: &mut String, results: &Results) -> std::fmt::Result {
    let cpu = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let cpu = cpu
        .lines()
        .find_map(|l| l.strip_prefix("model name"))
        .map_or("unknown CPU", |l| l.trim_start_matches([' ', '\t', ':']));
    let cores = std::thread::available_parallelism().map_or(0, usize::from);
    let kernel = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    writeln!(
        text,
        "Measured on {} for {:?} per work, {:.0} s in all; {cores} × {cpu}, Linux {}.",
        time::OffsetDateTime::now_utc().date(),
        results.time,
        results.took.as_secs_f64(),
        kernel.trim()
    )?;
    for (name, version) in &results.versions {
        writeln!(text, "- {name}: {version}")?;
    }
    writeln!(text)
}

fn cost(text: &mut String, results: &Results, works: &[&'static Work]) -> std::fmt::Result {
    let present: Vec<_> = NAMES.into_iter().filter(|n| results.versions.contains_key(n)).collect();
    writeln!(text, "CPU time of both proxies together: microseconds per request, or seconds per GiB.\n")?;
    write!(text, "| work |")?;
    for name in &present {
        write!(text, " {name} |")?;
    }
    writeln!(text, " to HAProxy | to Envoy | first target | aim | |")?;
    writeln!(text, "|---|{}---:|---:|---|---|---|", "---:|".repeat(present.len()))?;
    for work in works {
        let costs = costs(results, work);
        write!(text, "| {} |", title(work))?;
        for name in &present {
            write!(text, " {} |", costs.get(name).map_or("–".into(), |c| round(*c)))?;
        }
        let ratio = |to| ratio(&costs, to);
        for to in [Name::Haproxy, Name::Envoy] {
            write!(text, " {} |", ratio(to).map_or("–".into(), |r| format!("{r:.2}")))?;
        }
        let target = work.target;
        let verdict = match ratio(target.of) {
            None => "",
            Some(r) if r <= target.aim => "aim reached",
            Some(r) if r <= target.first => "target reached",
            Some(_) => "**not yet**",
        };
        writeln!(text, " ≤ {} × {2} | ≤ {} × {2} | {verdict} |", target.first, target.aim, target.of)?;
    }
    writeln!(text)
}

fn detail(text: &mut String, results: &Results, works: &[&'static Work]) -> std::fmt::Result {
    writeln!(text, "Throughput and latency as the client sees them; `direct` is without any proxy.\n")?;
    writeln!(
        text,
        "| work | proxy | requests/s | MiB/s | p50 ms | p90 | p99 | p99.9 | CPU outbound | CPU inbound | errors |"
    )?;
    writeln!(text, "|---|---|{}", "---:|".repeat(9))?;
    for work in works {
        let direct = results.direct.get(work.name).map(|m| ("direct".to_string(), m));
        let measured = NAMES.iter().filter_map(|n| Some((n.to_string(), results.works.get(&(work.name, *n))?)));
        for (name, m) in direct.into_iter().chain(measured) {
            let seconds = m.elapsed.as_secs_f64();
            let ms = |p: &str| format!("{:.2}", count(m, p) as f64 / 1000.0);
            let busy = |cpu: Duration| format!("{:.0} %", 100.0 * cpu.as_secs_f64() / seconds);
            writeln!(
                text,
                "| {} | {name} | {:.0} | {:.1} | {} | {} | {} | {} | {} | {} | {} |",
                work.name,
                count(m, "requests") as f64 / seconds,
                count(m, "bytes") as f64 / seconds / f64::from(1 << 20),
                ms("p50"),
                ms("p90"),
                ms("p99"),
                ms("p999"),
                busy(m.cpu.0),
                busy(m.cpu.1),
                count(m, "errors")
            )?;
        }
    }
    writeln!(text)?;
    let p99 = |m: &Measured| count(m, "p99") as f64 / 1000.0;
    if let Some(direct) = results.direct.get(RATE) {
        let added = |n: &Name| Some(format!("{n} {:.2}", p99(results.works.get(&(RATE, *n))?) - p99(direct)));
        let added: Vec<_> = NAMES.iter().filter_map(added).collect();
        writeln!(
            text,
            "Latency added at p99 at a constant rate, ms: {}. Target: no more than HAProxy's.\n",
            added.join(", ")
        )?;
    }
    Ok(())
}

fn rest(text: &mut String, results: &Results) -> std::fmt::Result {
    writeln!(
        text,
        "| | start to ready, ms | program, MiB | idle PSS outbound, MiB | inbound | KiB per idle used connection, both |"
    )?;
    writeln!(text, "|---|---:|---:|---:|---:|---:|")?;
    for (name, r) in &results.rest {
        let mib = |kib: u64| kib as f64 / 1024.0;
        writeln!(
            text,
            "| {name} | {} | {:.1} | {:.1} | {:.1} | {:.1} |",
            r.start.as_millis(),
            mib(r.size / 1024),
            mib(r.pss.0),
            mib(r.pss.1),
            r.per_connection
        )?;
    }
    writeln!(
        text,
        "\nTargets: ready within 100 ms, program at most 12 MB, idle at most 8 MiB (aim 5), connection at most 6 KiB (aim 2)."
    )
}

/// Cost of a work by proxy, in what its unit says.
fn costs(results: &Results, work: &Work) -> BTreeMap<Name, f64> {
    let cost = |m: &Measured| {
        let cpu = (m.cpu.0 + m.cpu.1).as_secs_f64();
        let (n, scale) = match work.unit {
            Unit::Request => (count(m, "requests") as f64, 1e6),
            Unit::Gibibyte => (count(m, "bytes") as f64 / f64::from(1 << 30), 1.0),
        };
        (n > 0.0).then_some(cpu * scale / n)
    };
    NAMES.into_iter().filter_map(|n| Some((n, cost(results.works.get(&(work.name, n))?)?))).collect()
}

fn ratio(costs: &BTreeMap<Name, f64>, to: Name) -> Option<f64> {
    Some(costs.get(&Name::Ours)? / costs.get(&to)?)
}

fn count(measured: &Measured, name: &str) -> u64 {
    measured.counts.get(name).copied().unwrap_or(0)
}

fn title(work: &Work) -> String {
    let unit = match work.unit {
        Unit::Request => "µs/request",
        Unit::Gibibyte => "s/GiB",
    };
    format!("{}, {unit}", work.title)
}

fn round(n: f64) -> String {
    if n < 10.0 { format!("{n:.2}") } else { format!("{n:.0}") }
}

/// Bars for the cost of each work, HAProxy's (or the only one's) being 1.
pub(crate) fn plot(results: &Results, works: &[&'static Work]) -> String {
    const BAR: usize = 14;
    const LEFT: usize = 330;
    const WIDTH: usize = 420;
    let rows: Vec<_> =
        works.iter().map(|work| (title(work), costs(results, work))).filter(|(_, c)| !c.is_empty()).collect();
    let base =
        |costs: &BTreeMap<Name, f64>| costs.get(&Name::Haproxy).or(costs.values().next()).copied().unwrap_or(1.0);
    let most = rows.iter().flat_map(|(_, c)| c.values().map(|v| v / base(c))).fold(1.0, f64::max);
    let height = 50 + rows.iter().map(|(_, c)| c.len() * BAR + 12).sum::<usize>();
    let mut svg = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{0}\" height=\"{height}\" font-family=\"sans-serif\" font-size=\"12\">\n\
         <rect width=\"{0}\" height=\"{height}\" fill=\"white\"/>\n\
         <text x=\"10\" y=\"18\" font-weight=\"bold\">CPU time of both proxies, HAProxy = 1 (shorter is better)</text>\n",
        LEFT + WIDTH + 110
    );
    for (i, name) in NAMES.iter().enumerate() {
        let x = LEFT + i * 130;
        let _ = writeln!(
            svg,
            "<rect x=\"{x}\" y=\"26\" width=\"10\" height=\"10\" fill=\"{}\"/><text x=\"{}\" y=\"35\">{name}</text>",
            COLORS[i],
            x + 14
        );
    }
    let mut y = 48;
    for (title, costs) in &rows {
        let _ = writeln!(svg, "<text x=\"{}\" y=\"{}\" text-anchor=\"end\">{title}</text>", LEFT - 8, y + 11);
        for (i, name) in NAMES.iter().enumerate() {
            let Some(cost) = costs.get(name) else { continue };
            let ratio = cost / base(costs);
            let width = ratio / most * WIDTH as f64;
            let _ = writeln!(
                svg,
                "<rect x=\"{LEFT}\" y=\"{y}\" width=\"{width:.1}\" height=\"{}\" fill=\"{}\"/>\
                 <text x=\"{:.1}\" y=\"{}\">{ratio:.2} ({})</text>",
                BAR - 2,
                COLORS[i],
                LEFT as f64 + width + 5.0,
                y + 10,
                round(*cost)
            );
            y += BAR;
        }
        y += 12;
    }
    svg.push_str("</svg>\n");
    svg
}
