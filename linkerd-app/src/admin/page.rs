//! The page `/`: every panel as a table, made from the same values as its JSON twin. No script, nothing from elsewhere.

use super::{Admin, answer};
use http::{Response, StatusCode};
use linkerd_stack::http::Body;
use serde_json::Value;
use std::fmt::Write as _;

/// Rows of a panel that are shown; the JSON twin has all.
const MAX_ROWS: usize = 1_000;

const HEAD: &str = "<!doctype html><meta charset=\"utf-8\"><title>linkerd-proxy</title><style>\
body{font:14px/1.4 system-ui,sans-serif;margin:2em;color:#222}h1{font-size:1.3em}h2{font-size:1.1em;margin:1.5em 0 .4em}\
table{border-collapse:collapse}td,th{border:1px solid #ddd;padding:.2em .6em;text-align:left;vertical-align:top}\
th{background:#f4f4f4;font-weight:600}a{color:#06c;font-size:.8em;font-weight:400}.bad{color:#b00}</style>\
<h1>linkerd-proxy</h1>";

pub(super) fn html(admin: &Admin) -> Response<Body> {
    let mut out = String::from(HEAD);
    // Writing to a String cannot fail, here and below.
    let _ = write!(
        out,
        "<p>{} · <a href=\"/metrics\">metrics</a> · <a href=\"/status.json\">status.json</a></p>",
        if admin.0.ready.get() { "ready" } else { "<span class=\"bad\">not ready</span>" }
    );
    for (name, value) in admin.status() {
        let _ = write!(out, "<h2>{name} <a href=\"/status/{name}.json\">json</a></h2>");
        render(&mut out, &value);
    }
    answer(StatusCode::OK, Some("text/html; charset=utf-8"), out)
}

fn render(out: &mut String, value: &Value) {
    match value {
        Value::Null => out.push('–'),
        Value::Bool(_) | Value::Number(_) => drop(write!(out, "{value}")),
        Value::String(text) => escape(out, text),
        Value::Array(items) => array(out, items),
        Value::Object(fields) if fields.is_empty() => out.push('–'),
        Value::Object(fields) => {
            out.push_str("<table>");
            for (name, value) in fields.iter().take(MAX_ROWS) {
                out.push_str("<tr><th>");
                escape(out, name);
                out.push_str("<td>");
                render(out, value);
            }
            cut(out, fields.len());
            out.push_str("</table>");
        }
    }
}

/// Objects as rows under the first one's names, everything else as lines.
fn array(out: &mut String, items: &[Value]) {
    let Some(first) = items.first() else { return out.push('–') };
    out.push_str("<table>");
    if let Value::Object(columns) = first {
        out.push_str("<tr>");
        for name in columns.keys() {
            out.push_str("<th>");
            escape(out, name);
        }
        for item in items.iter().take(MAX_ROWS) {
            out.push_str("<tr>");
            for name in columns.keys() {
                out.push_str("<td>");
                render(out, item.get(name).unwrap_or(&Value::Null));
            }
        }
    } else {
        for item in items.iter().take(MAX_ROWS) {
            out.push_str("<tr><td>");
            render(out, item);
        }
    }
    cut(out, items.len());
    out.push_str("</table>");
}

fn cut(out: &mut String, len: usize) {
    if len > MAX_ROWS {
        let _ = write!(out, "<tr><td>… and {} more", len - MAX_ROWS);
    }
}

fn escape(out: &mut String, text: &str) {
    for c in text.chars() {
        match c {
            '<' => out.push_str("&lt;"),
            '>' => out.push_str("&gt;"),
            '&' => out.push_str("&amp;"),
            '"' => out.push_str("&quot;"),
            c => out.push(c),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_become_tables() {
        let mut out = String::new();
        render(&mut out, &serde_json::json!([{ "addr": "1.2.3.4:5", "open": 2 }, { "open": 3 }]));
        assert_eq!(out, "<table><tr><th>addr<th>open<tr><td>1.2.3.4:5<td>2<tr><td>–<td>3</table>");
        out.clear();
        render(&mut out, &serde_json::json!({ "<b>": ["a&\"b", null] }));
        assert_eq!(out, "<table><tr><th>&lt;b&gt;<td><table><tr><td>a&amp;&quot;b<tr><td>–</table></table>");
        out.clear();
        render(&mut out, &vec![Value::from(1); MAX_ROWS + 2].into());
        assert!(out.ends_with("<tr><td>… and 2 more</table>"));
    }
}
