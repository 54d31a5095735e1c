//! Labels: short texts that users give to VMs, to tell them apart and to choose several at once.

use super::{LabelKey, LabelValue};
use crate::error::{Error, Result};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// The most labels of a VM.
const LABELS_MAX: usize = 32;
/// The most bytes that the labels of a VM have together, keys and values. A VM's row is written as
/// a whole, so this also bounds what each change of the VM costs.
const LABELS_BYTES_MAX: usize = 4096;
const KEY_LEN_MAX: usize = 128;
const VALUE_LEN_MAX: usize = 1024;

pub(super) fn is_key(text: &str) -> bool {
    let is_end = |b: Option<&u8>| b.is_some_and(u8::is_ascii_alphanumeric);
    let bytes = text.as_bytes();
    bytes.len() <= KEY_LEN_MAX
        && is_end(bytes.first())
        && is_end(bytes.last())
        && bytes
            .iter()
            .all(|b| b.is_ascii_alphanumeric() || b"._-/".contains(b))
}

pub(super) fn is_value(text: &str) -> bool {
    text.len() <= VALUE_LEN_MAX && !text.chars().any(char::is_control)
}

/// The labels of a VM. Never more than [`LABELS_MAX`], nor more than [`LABELS_BYTES_MAX`].
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "BTreeMap<LabelKey, LabelValue>")]
pub struct Labels(BTreeMap<LabelKey, LabelValue>);

impl TryFrom<BTreeMap<LabelKey, LabelValue>> for Labels {
    type Error = Error;

    fn try_from(labels: BTreeMap<LabelKey, LabelValue>) -> Result<Self> {
        if labels.len() > LABELS_MAX {
            let text = format!(
                "a VM has at most {LABELS_MAX} labels, and these are {}",
                labels.len()
            );
            return Err(Error::invalid(text).hint("leave some out"));
        }
        let size = |(key, value): (&LabelKey, &LabelValue)| key.0.len() + value.0.len();
        let bytes: usize = labels.iter().map(size).sum();
        if bytes > LABELS_BYTES_MAX {
            let text = format!(
                "the labels of a VM have at most {LABELS_BYTES_MAX} bytes together, and these have {bytes}"
            );
            return Err(Error::invalid(text).hint("leave some out, or shorten them"));
        }
        Ok(Self(labels))
    }
}

impl Labels {
    /// Collects labels. A later value replaces an earlier one with the same key.
    ///
    /// # Errors
    /// `invalid_argument` if there are too many, or if they are too long together.
    pub fn new(labels: impl IntoIterator<Item = (LabelKey, LabelValue)>) -> Result<Self> {
        labels.into_iter().collect::<BTreeMap<_, _>>().try_into()
    }

    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    pub fn get(&self, key: &LabelKey) -> Option<&LabelValue> {
        self.0.get(key)
    }

    pub fn iter(&self) -> impl Iterator<Item = (&LabelKey, &LabelValue)> {
        self.0.iter()
    }

    /// Returns these labels without those named by `removed`, and then with `added`.
    ///
    /// # Errors
    /// Those of [`Labels::new`].
    pub fn changed(&self, added: &Labels, removed: &[LabelKey]) -> Result<Self> {
        let kept = self.0.clone().into_iter();
        let kept = kept.filter(|(key, _)| !removed.contains(key));
        Self::new(kept.chain(added.0.clone()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn labels(texts: &[(&str, &str)]) -> Labels {
        let parse = |(key, value): &(&str, &str)| (key.parse().unwrap(), value.parse().unwrap());
        Labels::new(texts.iter().map(parse)).unwrap()
    }

    #[test]
    fn label_keys_and_values_are_validated() {
        for good in ["ci", "A", "com.example/owner-1", "a_b", &"k".repeat(128)] {
            assert!(good.parse::<LabelKey>().is_ok(), "{good}");
        }
        for bad in [
            "",
            "ci-",
            "-ci",
            ".a",
            "a/",
            "a=b",
            "a b",
            "ä",
            "a,b",
            "a\n",
            &"k".repeat(129),
        ] {
            assert!(bad.parse::<LabelKey>().is_err(), "{bad}");
        }
        for good in ["", "yes", "a=b, c", "für", "/home/me/x", &"v".repeat(1024)] {
            assert!(good.parse::<LabelValue>().is_ok(), "{good}");
        }
        for bad in ["a\n", "\u{1b}[2J", "\0", &"v".repeat(1025)] {
            assert!(bad.parse::<LabelValue>().is_err(), "{bad}");
        }
    }

    #[test]
    fn labels_are_bounded() {
        let many = |n: usize, value: &str| {
            let label = |i| (format!("k{i}").parse().unwrap(), value.parse().unwrap());
            Labels::new((0..n).map(label))
        };
        assert!(many(32, "x").is_ok());
        let e = many(33, "x").unwrap_err().to_string();
        assert_eq!(e, "a VM has at most 32 labels, and these are 33");
        let e = many(5, &"v".repeat(1024)).unwrap_err().to_string();
        assert_eq!(
            e,
            "the labels of a VM have at most 4096 bytes together, and these have 5130"
        );
    }

    #[test]
    fn labels_change_by_key() {
        let before = labels(&[("a", "1"), ("b", "2"), ("c", "3")]);
        let removed = ["a".parse().unwrap(), "none".parse().unwrap()];
        let after = before.changed(&labels(&[("b", "4"), ("d", "")]), &removed);
        assert_eq!(after.unwrap(), labels(&[("b", "4"), ("c", "3"), ("d", "")]));
        // A key that is both removed and added gets its new value.
        let after = before.changed(&labels(&[("a", "5")]), &removed).unwrap();
        assert_eq!(after, labels(&[("a", "5"), ("b", "2"), ("c", "3")]));
    }

    #[test]
    fn labels_round_trip_and_reject_invalid_keys() {
        let text = r#"{"a":"1","b":""}"#;
        let parsed: Labels = serde_json::from_str(text).unwrap();
        assert_eq!(serde_json::to_string(&parsed).unwrap(), text);
        for bad in [r#"{"-":"1"}"#, r#"{"a":"\n"}"#, r#"{"a":1}"#] {
            assert!(serde_json::from_str::<Labels>(bad).is_err(), "{bad}");
        }
    }
}
