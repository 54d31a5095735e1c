//! Reads the name of an image's distribution.

use super::entry::EntryKind;
use super::files::IndexedLayer;
use super::merge::{Content, ROOT, Tree};
use crate::host::text::printable;
use std::os::unix::fs::FileExt;

/// The paths of os-release(5). The first is usually a link to the second.
const PATHS: [&str; 2] = ["usr/lib/os-release", "etc/os-release"];
const BYTES_MAX: u64 = 16 << 10;
const NAME_CHARS_MAX: usize = 80;

/// Returns `PRETTY_NAME`, if the image has an os-release file with it.
pub(super) fn pretty_name(tree: &Tree<'_>, layers: &[IndexedLayer]) -> Option<String> {
    PATHS
        .iter()
        .find_map(|path| name_in(&read(tree, layers, path)?))
}

fn read(tree: &Tree<'_>, layers: &[IndexedLayer], path: &str) -> Option<String> {
    let mut at = ROOT;
    for name in path.split('/') {
        let Content::Directory { children, .. } = &tree.node(at).content else {
            return None;
        };
        at = *children.get(name)?;
    }
    let Content::Object(object) = &tree.node(at).content else {
        return None;
    };
    let EntryKind::File { offset, bytes } = tree.entry(*object).kind else {
        return None;
    };
    let mut content = vec![0; usize::try_from(bytes.min(BYTES_MAX)).ok()?];
    let tar = &layers.get(object.layer as usize)?.tar;
    tar.read_exact_at(&mut content, offset).ok()?;
    Some(String::from_utf8_lossy(&content).into_owned())
}

fn name_in(os_release: &str) -> Option<String> {
    let line = os_release
        .lines()
        .find_map(|line| line.strip_prefix("PRETTY_NAME="))?;
    let name = line.trim().trim_matches(['"', '\'']);
    let short: String = printable(name).chars().take(NAME_CHARS_MAX).collect();
    (!short.is_empty()).then_some(short)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pretty_name_is_unquoted_and_harmless() {
        let text = "ID=debian\nPRETTY_NAME=\"Debian GNU/Linux 12 (bookworm)\"\n";
        assert_eq!(
            name_in(text).as_deref(),
            Some("Debian GNU/Linux 12 (bookworm)")
        );
        assert_eq!(
            name_in("PRETTY_NAME='a\u{1b}b'").as_deref(),
            Some("a\\u{1b}b")
        );
        assert_eq!(name_in("PRETTY_NAME=\"\"\nNAME=x"), None);
        assert_eq!(name_in("NAME=x"), None);
    }
}
