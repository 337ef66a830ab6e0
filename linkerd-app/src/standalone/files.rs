//! Folders of manifests to objects, read again only where something changed: a file by its stamp, a document by its
//! content. A change of a cluster counts as a whole: while any of its files has an error, nothing of what changed there is
//! handed on.

use super::{
    Work,
    manifest::{self, Key, Object, Read},
    report::{Finding, Severity},
    yaml,
};
use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    fs, io,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    sync::{Arc, atomic::Ordering},
    time::{Duration, SystemTime},
};

/// Deepest folder below one that was named.
const MAX_DEPTH: usize = 16;
/// Most files in all folders.
const MAX_FILES: usize = 100_000;
/// Most findings kept of one file; a file that is no manifest at all would fill the report.
const MAX_FINDINGS: usize = 100;
/// A file younger than this is read even if its stamp is known: clocks of file systems are coarse.
const SETTLED: Duration = Duration::from_secs(2);

/// A folder of manifests.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Folder {
    /// The folder, or a single file.
    pub path: PathBuf,
    /// The other cluster that it stands for; none = the cluster that this proxy belongs to.
    pub cluster: Option<Cluster>,
}

/// Another cluster of a federation. What is not told here is looked for in the manifests, and else is as in ours.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Cluster {
    /// Its name, as Services refer to it (`multicluster.linkerd.io/remote-discovery`).
    pub name: Arc<str>,
    /// Trust domain of its workloads' identities.
    pub trust_domain: Option<Arc<str>>,
    /// Domain of its Services' names.
    pub cluster_domain: Option<Arc<str>>,
    /// Namespace of its control plane, a part of its workloads' identities.
    pub control_plane_namespace: Option<Arc<str>>,
}

/// A file in the order in which files are read: later ones win.
type FileId = (usize, Arc<PathBuf>);
/// Where an object stands: file, document, item of a list.
type Place = (FileId, usize, usize);

/// What is known of the folders.
#[derive(Default)]
pub(super) struct Files {
    folders: Vec<Folder>,
    /// As on disk.
    files: BTreeMap<FileId, File>,
    /// Trouble with folders themselves, and which.
    folder_findings: Vec<(usize, Finding)>,
    /// Files that differ from what was handed on.
    dirty: BTreeSet<FileId>,
    /// What was handed on, by file and by object.
    handed: BTreeMap<FileId, Vec<(Key, Place)>>,
    places: HashMap<Key, BTreeMap<Place, Arc<Object>>>,
    work: Arc<Work>,
}

#[derive(Default)]
struct File {
    stamp: Option<Stamp>,
    documents: Vec<Document>,
    /// Trouble with the file as a whole.
    findings: Vec<Finding>,
    /// Whether anything in it blocks the swap.
    bad: bool,
}

#[derive(Clone, Copy, PartialEq, Eq)]
struct Stamp {
    inode: u64,
    length: u64,
    modified: (i64, i64),
    changed: (i64, i64),
}

struct Document {
    number: usize,
    line: usize,
    length: usize,
    hash: u64,
    /// Shared with the state before, if the text is the same.
    reads: Arc<Vec<Read>>,
    /// Set if the text is no YAML.
    syntax: Option<yaml::SyntaxError>,
}

/// A changed object; none = gone.
pub(super) type Change = (Key, Option<Arc<Object>>);

impl Files {
    pub(super) fn new(folders: Vec<Folder>, work: Arc<Work>) -> Self {
        Self { folders, work, ..Self::default() }
    }

    /// Looks at the folders. True if anything differs from the last look.
    pub(super) fn scan(&mut self) -> bool {
        let mut found = BTreeMap::new();
        let mut findings = Vec::new();
        for (index, folder) in self.folders.iter().enumerate() {
            walk(index, &folder.path, 0, &mut found, &mut findings);
        }
        let mut changed = findings != self.folder_findings;
        self.folder_findings = findings;
        let gone: Vec<_> = self.files.keys().filter(|id| !found.contains_key(*id)).cloned().collect();
        for id in gone {
            self.files.remove(&id);
            self.dirty.insert(id);
            changed = true;
        }
        for (id, meta) in found {
            changed |= self.look(id, &meta);
        }
        changed
    }

    fn look(&mut self, id: FileId, meta: &fs::Metadata) -> bool {
        let stamp = Stamp {
            inode: meta.ino(),
            length: meta.len(),
            modified: (meta.mtime(), meta.mtime_nsec()),
            changed: (meta.ctime(), meta.ctime_nsec()),
        };
        let settled = meta
            .modified()
            .ok()
            .and_then(|m| SystemTime::now().duration_since(m).ok())
            .is_some_and(|age| age > SETTLED);
        let old = self.files.get(&id);
        if settled && old.is_some_and(|f| f.stamp == Some(stamp)) {
            return false;
        }
        let cluster = self.cluster(id.0);
        let mut file = match read_text(&id.1, meta.len()) {
            Ok(text) => parse(&text, old, stamp, &cluster, &self.work, &id.1),
            Err(why) => File { findings: vec![whole(&id.1, why)], ..File::default() },
        };
        let issue = |d: &Document| d.reads.iter().flat_map(|r| &r.issues).any(|i| i.severity == Severity::Error);
        file.bad = !file.findings.is_empty() || file.documents.iter().any(|d| d.syntax.is_some() || issue(d));
        let same = old.is_some_and(|o| o.findings == file.findings && same_documents(&o.documents, &file.documents));
        if !same {
            self.dirty.insert(id.clone());
        }
        self.files.insert(id, file);
        !same
    }

    /// Everything that was found, errors first.
    pub(super) fn findings(&self) -> Vec<Finding> {
        let mut out: Vec<_> = self.folder_findings.iter().map(|(_, finding)| finding.clone()).collect();
        for ((_, path), file) in &self.files {
            out.extend(file.findings.iter().cloned());
            out.extend(file.documents.iter().flat_map(|d| d.findings(path)).take(MAX_FINDINGS));
        }
        out.sort_by_key(|f| f.severity);
        out
    }

    /// Clusters of which something blocks the swap; the own one has the empty name.
    pub(super) fn blocked(&self) -> BTreeSet<Arc<str>> {
        let folders =
            self.folder_findings.iter().filter(|(_, f)| f.severity == Severity::Error).map(|(folder, _)| *folder);
        let files = self.files.iter().filter(|(_, f)| f.bad).map(|((folder, _), _)| *folder);
        folders.chain(files).map(|folder| self.cluster(folder)).collect()
    }

    /// Logs what blocks a swap.
    pub(super) fn tell_errors(&self) {
        for finding in self.findings().iter().filter(|f| f.severity == Severity::Error) {
            tracing::error!(%finding, "manifest refused; the last good state of its cluster stays in force");
        }
    }

    fn cluster(&self, folder: usize) -> Arc<str> {
        self.folders[folder].cluster.as_ref().map_or_else(|| "".into(), |c| c.name.clone())
    }

    pub(super) fn count(&self) -> usize {
        self.files.len()
    }

    /// Hands on what changed since the last time, each object once, but of the clusters that are `blocked` nothing.
    pub(super) fn take_changes(&mut self, blocked: &BTreeSet<Arc<str>>) -> Vec<Change> {
        let mut before: HashMap<Key, Option<Arc<Object>>> = HashMap::new();
        let (kept, dirty) = std::mem::take(&mut self.dirty)
            .into_iter()
            .partition(|(folder, _)| blocked.contains(&self.cluster(*folder)));
        self.dirty = kept;
        let dirty: BTreeSet<FileId> = dirty;
        for id in dirty {
            for (key, place) in self.handed.remove(&id).unwrap_or_default() {
                let places = self.places.entry(key.clone()).or_default();
                before.entry(key).or_insert_with(|| places.values().next_back().cloned());
                places.remove(&place);
            }
            let Some(file) = self.files.get(&id) else { continue };
            let mut handed = Vec::new();
            for document in &file.documents {
                for (item, read) in document.reads.iter().enumerate() {
                    let Some((key, object)) = &read.object else { continue };
                    let place = (id.clone(), document.number, item);
                    let places = self.places.entry(key.clone()).or_default();
                    before.entry(key.clone()).or_insert_with(|| places.values().next_back().cloned());
                    places.insert(place.clone(), object.clone());
                    handed.push((key.clone(), place));
                }
            }
            self.handed.insert(id, handed);
        }
        let mut changes = Vec::new();
        for (key, old) in before {
            let new = self.places.get(&key).and_then(|p| p.values().next_back().cloned());
            if new.is_none() {
                self.places.remove(&key);
            }
            let same = match (&old, &new) {
                (Some(a), Some(b)) => Arc::ptr_eq(a, b),
                (None, None) => true,
                _ => false,
            };
            if !same {
                changes.push((key, new));
            }
        }
        changes.sort_by(|a, b| a.0.cmp(&b.0));
        self.work.objects.fetch_add(changes.len() as u64, Ordering::Relaxed);
        changes
    }

    /// Objects that stand in several places: where the one stands that counts, and how many others there are.
    pub(super) fn duplicates(&self) -> Vec<Finding> {
        let mut out = Vec::new();
        for (key, places) in &self.places {
            if places.len() < 2 {
                continue;
            }
            if let Some((((_, path), document, _), _)) = places.iter().next_back() {
                out.push(self.finding(
                    path,
                    *document,
                    key.to_string(),
                    format!("the same object stands in {} other places; this one, read last, counts", places.len() - 1),
                ));
            }
        }
        out.sort_by(|a, b| (&a.file, a.document).cmp(&(&b.file, b.document)));
        out
    }

    /// Where an object stands: file, document, line.
    pub(super) fn locate(&self, key: &Key) -> Option<(Arc<PathBuf>, usize, usize)> {
        let (place, _) = self.places.get(key)?.iter().next_back()?;
        let line = self.files.get(&place.0)?.documents.iter().find(|d| d.number == place.1).map_or(0, |d| d.line);
        Some((place.0.1.clone(), place.1, line))
    }

    fn finding(&self, path: &Arc<PathBuf>, document: usize, object: String, why: String) -> Finding {
        Finding {
            severity: Severity::Warning,
            file: path.clone(),
            document,
            line: 0,
            object,
            field: String::new(),
            why,
            remedy: String::new(),
        }
    }

    pub(super) fn folders(&self) -> &[Folder] {
        &self.folders
    }
}

fn same_documents(a: &[Document], b: &[Document]) -> bool {
    a.len() == b.len() && a.iter().zip(b).all(|(a, b)| a.hash == b.hash && a.length == b.length && a.line == b.line)
}

fn whole(path: &Arc<PathBuf>, why: String) -> Finding {
    Finding {
        severity: Severity::Error,
        file: path.clone(),
        document: 0,
        line: 0,
        object: String::new(),
        field: String::new(),
        why,
        remedy: "Check that it exists and that this user may read it".into(),
    }
}

/// Collects manifest files. Hidden names are skipped: editors and mounted ConfigMaps put their own things there.
fn walk(
    index: usize,
    path: &Path,
    depth: usize,
    found: &mut BTreeMap<FileId, fs::Metadata>,
    findings: &mut Vec<(usize, Finding)>,
) {
    let whole = |why| (index, whole(&Arc::new(path.to_path_buf()), why));
    let fail = |e: io::Error| whole(format!("can't be read: {e}"));
    let meta = match fs::metadata(path) {
        Ok(meta) => meta,
        // A file that went away between listing and looking is simply gone.
        Err(e) if depth > 0 && e.kind() == io::ErrorKind::NotFound => return,
        Err(e) => return findings.push(fail(e)),
    };
    if meta.is_dir() {
        if depth > MAX_DEPTH {
            return findings.push(whole(format!("folders are nested more than {MAX_DEPTH} deep")));
        }
        let entries = match fs::read_dir(path) {
            Ok(entries) => entries,
            Err(e) => return findings.push(fail(e)),
        };
        for entry in entries {
            match entry {
                Ok(entry) if entry.file_name().as_encoded_bytes().starts_with(b".") => {}
                Ok(entry) => walk(index, &entry.path(), depth + 1, found, findings),
                Err(e) => findings.push(fail(e)),
            }
        }
        return;
    }
    let manifest = path.extension().is_some_and(|e| e == "yaml" || e == "yml" || e == "json");
    if meta.is_file() && (manifest || depth == 0) {
        if found.len() >= MAX_FILES {
            return findings.push(whole(format!("more than {MAX_FILES} files")));
        }
        found.insert((index, Arc::new(path.to_path_buf())), meta);
    }
}

fn read_text(path: &Path, length: u64) -> Result<String, String> {
    if length > yaml::MAX_FILE {
        return Err(format!("{length} bytes are more than {}", yaml::MAX_FILE));
    }
    let bytes = fs::read(path).map_err(|e| format!("can't be read: {e}"))?;
    String::from_utf8(bytes).map_err(|e| format!("is not UTF-8 text (byte {})", e.utf8_error().valid_up_to()))
}

fn parse(text: &str, old: Option<&File>, stamp: Stamp, cluster: &Arc<str>, work: &Work, path: &Arc<PathBuf>) -> File {
    use std::hash::{DefaultHasher, Hasher};
    let cut = yaml::documents(text.trim_start_matches('\u{feff}'));
    if cut.len() > yaml::MAX_DOCUMENTS {
        let why = format!("{} documents are more than {}", cut.len(), yaml::MAX_DOCUMENTS);
        return File { stamp: Some(stamp), findings: vec![whole(path, why)], ..File::default() };
    }
    // Documents of the state before, by content: moved ones are not read again.
    let known: HashMap<(u64, usize), &Document> =
        old.iter().flat_map(|f| &f.documents).map(|d| ((d.hash, d.length), d)).collect();
    let documents = cut
        .into_iter()
        .map(|d| {
            let mut hasher = DefaultHasher::new();
            hasher.write(d.text.as_bytes());
            let (hash, length) = (hasher.finish(), d.text.len());
            let (reads, syntax) = match known.get(&(hash, length)) {
                Some(known) if known.syntax.is_none() => (known.reads.clone(), None),
                _ => {
                    work.documents.fetch_add(1, Ordering::Relaxed);
                    match yaml::parse(&d) {
                        Ok(value) => (Arc::new(manifest::read(value, cluster)), None),
                        Err(error) => (Arc::default(), Some(error)),
                    }
                }
            };
            Document { number: d.number, line: d.line, length, hash, reads, syntax }
        })
        .collect();
    File { stamp: Some(stamp), documents, ..File::default() }
}

impl Document {
    fn findings<'a>(&'a self, path: &'a Arc<PathBuf>) -> impl Iterator<Item = Finding> + 'a {
        let syntax = self.syntax.iter().map(|s| Finding {
            severity: Severity::Error,
            file: path.clone(),
            document: self.number,
            line: s.line,
            object: String::new(),
            field: String::new(),
            why: s.why.clone(),
            remedy: String::new(),
        });
        let issues = self.reads.iter().flat_map(move |read| {
            read.issues.iter().map(move |issue| Finding {
                severity: issue.severity,
                file: path.clone(),
                document: self.number,
                line: self.line,
                object: read.label.clone(),
                field: issue.field.clone(),
                why: issue.why.clone(),
                remedy: issue.remedy.clone(),
            })
        });
        syntax.chain(issues)
    }
}
