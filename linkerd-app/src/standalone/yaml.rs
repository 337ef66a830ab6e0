//! Text to documents to JSON-like values, with bounds. A file is cut at document markers first, so that a mistake in one
//! document is told with its number, and a change in one document does not make the others be read again.

use serde_json::Value;

/// Largest file that is read, bytes: a manifest of 10,000 endpoints has about 3 MiB.
pub(super) const MAX_FILE: u64 = 64 * 1024 * 1024;
/// Most documents in one file.
pub(super) const MAX_DOCUMENTS: usize = 100_000;
/// Deepest nesting of one document. Kubernetes objects stay below 20.
const MAX_DEPTH: usize = 64;
/// Most nodes in one document, aliases expanded: an EndpointSlice of 1,000 endpoints has about 15,000.
const MAX_NODES: usize = 2_000_000;
/// Most values that aliases may expand to in one document.
const MAX_ALIAS_EVENTS: usize = 100_000;

/// One document of a file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Document<'a> {
    /// From 1, counting documents with content or comments only between markers.
    pub(super) number: usize,
    /// Line of its first byte in the file, from 1.
    pub(super) line: usize,
    pub(super) text: &'a str,
}

/// A document that is no YAML.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct SyntaxError {
    /// Line in the file, from 1.
    pub(super) line: usize,
    pub(super) why: String,
}

/// Cuts a file at its `---` and `...` lines. Both are markers wherever they stand at the start of a line, even inside
/// a block scalar (YAML 1.2.2, 9.1.2), so no parsing is needed for it. Documents of blanks and comments alone are dropped.
pub(super) fn documents(text: &str) -> Vec<Document<'_>> {
    let mut out = Vec::new();
    let (mut start, mut start_line, mut offset, mut line) = (0, 1, 0, 1);
    for piece in text.split_inclusive('\n') {
        let body = piece.trim_end_matches(['\n', '\r']);
        let marker = ["---", "..."]
            .into_iter()
            .find(|m| body.strip_prefix(m).is_some_and(|rest| rest.is_empty() || rest.starts_with([' ', '\t'])));
        if let Some(marker) = marker {
            add(&mut out, &text[start..offset], start_line);
            // What follows `---` on its line belongs to the document.
            start = offset + marker.len();
            start_line = line;
        }
        offset += piece.len();
        line += 1;
    }
    add(&mut out, &text[start..], start_line);
    out
}

fn add<'a>(out: &mut Vec<Document<'a>>, text: &'a str, line: usize) {
    let content = |l: &&str| {
        let l = l.trim();
        !l.is_empty() && !l.starts_with('#') && !l.starts_with('%')
    };
    if text.lines().any(|l| content(&l)) {
        out.push(Document { number: out.len() + 1, line, text });
    }
}

/// Reads one document. Mapping entries whose value is null are dropped: Kubernetes treats them as absent.
pub(super) fn parse(document: &Document<'_>) -> Result<Value, SyntaxError> {
    let options = serde_saphyr::options! {
        budget: serde_saphyr::budget! {
            max_depth: MAX_DEPTH,
            max_nodes: MAX_NODES,
            max_documents: 1,
        },
        alias_limits: serde_saphyr::alias_limits! {
            max_total_replayed_events: MAX_ALIAS_EVENTS,
        },
        leading_zero_numbers_as_strings: true,
        underscored_numbers_as_strings: true,
        with_snippet: false,
    };
    match serde_saphyr::from_str_with_options::<Value>(document.text, options) {
        Ok(mut value) => {
            drop_nulls(&mut value);
            Ok(value)
        }
        Err(error) => {
            let at = error.location().map_or(1, |l| usize::try_from(l.line()).unwrap_or(1).max(1));
            let why = error.to_string();
            Err(SyntaxError { line: document.line + at - 1, why: why.lines().next().unwrap_or("not YAML").to_string() })
        }
    }
}

fn drop_nulls(value: &mut Value) {
    match value {
        Value::Object(map) => {
            map.retain(|_, v| !v.is_null());
            map.values_mut().for_each(drop_nulls);
        }
        Value::Array(items) => items.iter_mut().for_each(drop_nulls),
        Value::Null | Value::Bool(_) | Value::Number(_) | Value::String(_) => {}
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_are_cut_at_markers() {
        let text = "# head\n---\na: 1\n---\n# nothing\n--- # c\nb: |\n  x\n  ---y\n...\nc: 3\n";
        let docs = documents(text);
        let seen: Vec<_> = docs.iter().map(|d| (d.number, d.line, d.text.trim())).collect();
        assert_eq!(seen, [(1, 2, "a: 1"), (2, 6, "# c\nb: |\n  x\n  ---y"), (3, 10, "c: 3")]);
    }

    #[test]
    fn nulls_are_absent_and_syntax_errors_have_lines() {
        let docs = documents("a: 1\n---\nb: null\nc: {d: ~, e: yes please}\n---\nx: [1\ny: 2\n");
        assert_eq!(parse(&docs[1]).unwrap(), serde_json::json!({"c": {"e": "yes please"}}));
        let error = parse(&docs[2]).unwrap_err();
        assert!((5..=8).contains(&error.line), "{error:?}");
        assert!(!error.why.is_empty());
    }

    #[test]
    fn alias_bombs_are_refused() {
        let mut text = String::from("a0: &a0 [x,x,x,x,x,x,x,x,x,x]\n");
        for i in 1..9 {
            let refs = vec![format!("*a{}", i - 1); 10].join(",");
            text.push_str(&format!("a{i}: &a{i} [{refs}]\n"));
        }
        assert!(parse(&documents(&text)[0]).is_err());
    }

    #[test]
    fn json_is_read() {
        let docs = documents("{\"kind\": \"Service\", \"spec\": {\"ports\": [{\"port\": 80}]}}\n");
        assert_eq!(parse(&docs[0]).unwrap()["spec"]["ports"][0]["port"], 80);
    }
}
