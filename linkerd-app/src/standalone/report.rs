//! What is wrong with a manifest, said so that it can be mended: file, document, line, object, field, why, and remedy.
//! Readers of objects collect issues by field; the folder adds where the object stands.

use std::{fmt, path::PathBuf, sync::Arc};

/// How grave a finding is.
#[derive(Copy, Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Severity {
    /// Blocks the swap to a new state, stops a start, makes `check` fail.
    Error,
    /// The object is used, but not in the way its author may expect.
    Warning,
    /// Worth knowing.
    Note,
}

/// One thing found in a manifest.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Finding {
    /// How grave.
    pub severity: Severity,
    /// The file.
    pub file: Arc<PathBuf>,
    /// The document in the file, from 1; 0 = the file as a whole.
    pub document: usize,
    /// The line where the document (or the syntax error) is, from 1; 0 = unknown.
    pub line: usize,
    /// `Kind namespace/name`, empty when not known.
    pub object: String,
    /// Path of the field, for instance `spec.rules[0].timeouts.request`; empty for the whole object.
    pub field: String,
    /// What is wrong, with the value.
    pub why: String,
    /// What to do; may be empty.
    pub remedy: String,
}

/// Everything found in some folders.
#[derive(Clone, Debug, Default)]
pub struct Report {
    /// Errors first, then in order of files and documents.
    pub findings: Vec<Finding>,
    /// Files read.
    pub files: usize,
    /// Objects understood.
    pub objects: usize,
    /// Services whose cluster addresses were assigned here, as `namespace/name` and address.
    pub assigned: Vec<(String, std::net::IpAddr)>,
}

/// A finding that does not know yet where its object stands.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Issue {
    pub(super) severity: Severity,
    pub(super) field: String,
    pub(super) why: String,
    pub(super) remedy: String,
    /// The field could not be read at all: something stands in for it, about which nothing is to be said.
    unread: bool,
}

/// Collects issues at a field.
pub(super) struct At<'a> {
    list: &'a mut Vec<Issue>,
    path: String,
}

impl<'a> At<'a> {
    pub(super) fn new(list: &'a mut Vec<Issue>, path: &str) -> Self {
        Self { list, path: path.to_string() }
    }

    /// The field of that name below this one.
    pub(super) fn field(&mut self, name: &str) -> At<'_> {
        // A path below a list begins with the number of an item.
        let dot = if self.path.is_empty() || name.starts_with('[') { "" } else { "." };
        let path = format!("{}{dot}{name}", self.path);
        At { list: self.list, path }
    }

    /// The entry with that key below this one; for keys that contain dots.
    pub(super) fn key(&mut self, key: &str) -> At<'_> {
        At { path: format!("{}[{key:?}]", self.path), list: self.list }
    }

    /// The item of that number below this one.
    pub(super) fn item(&mut self, index: usize) -> At<'_> {
        At { path: format!("{}[{index}]", self.path), list: self.list }
    }

    pub(super) fn say(&mut self, severity: Severity, why: impl Into<String>, remedy: impl Into<String>) {
        self.push(severity, why.into(), remedy.into(), false);
    }

    /// The field's value could not be read. It is not spoken of again.
    pub(super) fn unread(&mut self, why: impl Into<String>, remedy: impl Into<String>) {
        self.push(Severity::Error, why.into(), remedy.into(), true);
    }

    fn push(&mut self, severity: Severity, why: String, remedy: String, unread: bool) {
        let within = |field: &str| {
            self.path.strip_prefix(field).is_some_and(|rest| rest.is_empty() || rest.starts_with(['.', '[']))
        };
        if !self.list.iter().any(|issue| issue.unread && within(&issue.field)) {
            self.list.push(Issue { severity, field: self.path.clone(), why, remedy, unread });
        }
    }

    pub(super) fn error(&mut self, why: impl Into<String>, remedy: impl Into<String>) {
        self.say(Severity::Error, why, remedy);
    }

    pub(super) fn warn(&mut self, why: impl Into<String>, remedy: impl Into<String>) {
        self.say(Severity::Warning, why, remedy);
    }

    pub(super) fn note(&mut self, why: impl Into<String>) {
        self.say(Severity::Note, why, "");
    }

    /// Takes a value, or reports why there is none.
    pub(super) fn take<T>(&mut self, result: Result<T, String>) -> Option<T> {
        match result {
            Ok(value) => Some(value),
            Err(why) => {
                let (why, remedy) = remedied(&why);
                self.error(why, remedy);
                None
            }
        }
    }
}

/// What is wrong and what to do, of a text like `"x" is no number; write 0 to 9`.
pub(super) fn remedied(text: &str) -> (&str, String) {
    match text.rsplit_once("; write ") {
        Some((why, rest)) => (why, format!("Write {rest}")),
        None => (text, String::new()),
    }
}

impl Report {
    /// How many findings are errors.
    pub fn errors(&self) -> usize {
        self.findings.iter().filter(|f| f.severity == Severity::Error).count()
    }

    /// How many findings are warnings.
    pub fn warnings(&self) -> usize {
        self.findings.iter().filter(|f| f.severity == Severity::Warning).count()
    }
}

impl fmt::Display for Severity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Error => "error",
            Self::Warning => "warning",
            Self::Note => "note",
        })
    }
}

/// `error: FILE: document N (line L): KIND NS/NAME: FIELD: WHY. REMEDY`, leaving out what is not known.
impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.severity, self.file.display())?;
        if self.document > 0 {
            write!(f, ": document {}", self.document)?;
        }
        if self.line > 0 {
            write!(f, " (line {})", self.line)?;
        }
        for part in [&self.object, &self.field] {
            if !part.is_empty() {
                write!(f, ": {part}")?;
            }
        }
        write!(f, ": {}", self.why)?;
        if !self.remedy.is_empty() {
            write!(f, ". {}", self.remedy)?;
        }
        Ok(())
    }
}

/// One finding a line, then a line of totals.
impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for finding in &self.findings {
            writeln!(f, "{finding}")?;
        }
        for (service, ip) in &self.assigned {
            writeln!(f, "assigned: Service {service} has clusterIP {ip}")?;
        }
        write!(
            f,
            "{} files, {} objects: {} errors, {} warnings",
            self.files,
            self.objects,
            self.errors(),
            self.warnings()
        )
    }
}
