//! Parts of documents to types. A type's reader stops at the first thing that does not fit; whoever mends a manifest wants
//! to hear of all of them. So each misfit is told, something of another sort is put in its place, and the part is read
//! again, until everything fits. The stand-ins go no further than the checks that follow: the object has an error.

use super::super::report::{At, remedied};
use serde::de::DeserializeOwned;
use serde_json::{Map, Value};
use serde_path_to_error::{Path, Segment};
use std::collections::BTreeMap;

/// What is put in the place of a misfit, one after the other: something in each of the shapes that a field can have.
const STAND_INS: [fn() -> Value; 5] =
    [|| 1.into(), || "a".into(), || true.into(), || Value::Array(Vec::new()), || Value::Object(Map::new())];

/// Most misfits told of one part; someone who has mended these looks again.
const MAX_MISFITS: usize = 32;

type Misfit = serde_path_to_error::Error<serde_json::Error>;

/// A way down into a value.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Step {
    Field(String),
    Item(usize),
}

/// Reads a part of a document into a type; absent parts are empty. Every misfit is told with its path below `at`. None if
/// there are too many, or one that nothing could stand in for.
pub(super) fn typed<T: DeserializeOwned>(value: &Value, field: &str, at: &mut At<'_>) -> Option<T> {
    let empty = Value::Object(Map::new());
    let part = value.get(field).filter(|part| !part.is_null()).unwrap_or(&empty);
    match serde_path_to_error::deserialize(part) {
        Ok(typed) => Some(typed),
        Err(misfit) => mended(part.clone(), misfit, &mut at.field(field)),
    }
}

fn mended<T: DeserializeOwned>(mut part: Value, mut misfit: Misfit, at: &mut At<'_>) -> Option<T> {
    let mut tried: BTreeMap<Vec<Step>, usize> = BTreeMap::new();
    loop {
        let (steps, why, remedy) = told(&misfit);
        if !tried.contains_key(&steps) {
            if tried.len() == MAX_MISFITS {
                return None;
            }
            let below: String = steps.iter().map(Step::to_string).collect();
            match below.trim_start_matches('.') {
                "" => at.unread(why, remedy),
                below => at.field(below).unread(why, remedy),
            }
        }
        let next = tried.entry(steps.clone()).or_default();
        put(&mut part, &steps, STAND_INS.get(*next)?())?;
        *next += 1;
        match serde_path_to_error::deserialize(&part) {
            Ok(typed) => return Some(typed),
            Err(another) => misfit = another,
        }
    }
}

/// Where a misfit is, what is wrong, and what to do.
fn told(misfit: &Misfit) -> (Vec<Step>, String, String) {
    let mut steps = steps(misfit.path());
    let text = misfit.inner().to_string();
    let text = text.split(" at line ").next().unwrap_or_default();
    if let Some(name) = text.strip_prefix("missing field `").and_then(|rest| rest.strip_suffix('`')) {
        steps.push(Step::Field(name.to_string()));
        return (steps, "missing".to_string(), "Add the field".to_string());
    }
    match text.split_once(", expected ") {
        Some((found, wanted)) => {
            let found = ["invalid type: ", "invalid value: "].iter().find_map(|prefix| found.strip_prefix(prefix));
            (steps, format!("{} does not fit here", found.unwrap_or("this")), format!("Write {}", shape(wanted)))
        }
        None => {
            let (why, remedy) = remedied(text);
            (steps, why.to_string(), remedy)
        }
    }
}

/// What a type's reader expects, in the words of someone who writes manifests.
fn shape(wanted: &str) -> &str {
    match wanted {
        "u16" | "a nonzero u16" => "a whole number up to 65535",
        "u32" => "a whole number up to 4294967295",
        "i64" => "a whole number",
        "f64" => "a number",
        "a boolean" => "true or false",
        "a sequence" => "a list",
        wanted if wanted.starts_with("struct ") || wanted == "a map" => "a mapping",
        wanted => wanted,
    }
}

fn steps(path: &Path) -> Vec<Step> {
    let step = |segment: &Segment| match segment {
        Segment::Seq { index } => Some(Step::Item(*index)),
        Segment::Map { key } => Some(Step::Field(key.clone())),
        Segment::Enum { .. } | Segment::Unknown => None,
    };
    path.iter().filter_map(step).collect()
}

/// Puts a value where the steps lead; none if they lead nowhere.
fn put(value: &mut Value, steps: &[Step], new: Value) -> Option<()> {
    let Some((last, way)) = steps.split_last() else {
        *value = new;
        return Some(());
    };
    let parent = way.iter().try_fold(value, |value, step| match step {
        Step::Field(name) => value.get_mut(name),
        Step::Item(index) => value.get_mut(index),
    })?;
    match (parent, last) {
        (Value::Object(map), Step::Field(name)) => drop(map.insert(name.clone(), new)),
        (Value::Array(items), Step::Item(index)) => *items.get_mut(*index)? = new,
        _ => return None,
    }
    Some(())
}

/// As a path is written: `.field`, `["field.with.dots"]`, `[0]`.
impl std::fmt::Display for Step {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Field(name) if name.contains('.') => write!(f, "[{name:?}]"),
            Self::Field(name) => write!(f, ".{name}"),
            Self::Item(index) => write!(f, "[{index}]"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::{super::core::PortRef, *};
    use serde::Deserialize;
    use std::num::NonZeroU16;

    #[derive(Debug, Deserialize)]
    #[allow(dead_code)]
    struct Part {
        name: String,
        port: PortRef,
        number: Option<NonZeroU16>,
        #[serde(default)]
        list: Vec<Item>,
    }

    #[derive(Debug, Deserialize)]
    #[allow(dead_code)]
    struct Item {
        on: bool,
        labels: BTreeMap<String, String>,
    }

    /// Each issue as `field: why. remedy`, and whether there is a value for the checks that follow.
    #[track_caller]
    fn check(part: Value, expected: &[&str], read: bool) {
        let mut issues = Vec::new();
        let typed: Option<Part> = typed(&serde_json::json!({ "spec": part }), "spec", &mut At::new(&mut issues, ""));
        let told: Vec<_> = issues.iter().map(|i| format!("{}: {}. {}", i.field, i.why, i.remedy)).collect();
        assert_eq!(told, expected);
        assert_eq!(typed.is_some(), read);
    }

    #[test]
    fn every_misfit_is_told_once() {
        check(serde_json::json!({ "name": "x", "port": 80 }), &[], true);
        check(
            serde_json::json!({
                "name": 7, "number": 70000,
                "list": [{ "on": "yes", "labels": { "a.b/c": 1, "d": "e" } }, { "labels": [] }, "x"],
            }),
            &[
                "spec.list[0].labels[\"a.b/c\"]: integer `1` does not fit here. Write a string",
                "spec.list[0].on: string \"yes\" does not fit here. Write true or false",
                "spec.list[1].labels: sequence does not fit here. Write a mapping",
                "spec.list[1].on: missing. Add the field",
                "spec.list[2]: string \"x\" does not fit here. Write a mapping",
                "spec.name: integer `7` does not fit here. Write a string",
                "spec.number: integer `70000` does not fit here. Write a whole number up to 65535",
                "spec.port: missing. Add the field",
            ],
            true,
        );
        check(
            serde_json::json!({ "name": "x", "port": [] }),
            &["spec.port: [] is no port. Write a number from 1 to 65535 or the name of a container port"],
            true,
        );
        check(Value::Null, &["spec.name: missing. Add the field", "spec.port: missing. Add the field"], true);
    }

    #[test]
    fn misfits_are_bounded() {
        let items: Vec<_> = (0..100).map(|_| serde_json::json!({ "on": 1, "labels": {} })).collect();
        let mut issues = Vec::new();
        let part = serde_json::json!({ "spec": { "name": "x", "port": 80, "list": items } });
        assert!(typed::<Part>(&part, "spec", &mut At::new(&mut issues, "")).is_none());
        assert_eq!(issues.len(), MAX_MISFITS);
    }
}
