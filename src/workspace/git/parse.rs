//! Parses the output of git's plumbing commands.

use crate::error::{Error, Kind, Result};

/// One line of `ls-files -s -v -z`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(in crate::workspace) struct IndexEntry {
    pub mode: u32,
    pub oid: String,
    /// The entry's stage: 0, or 1 to 3 during a conflict.
    pub stage: u8,
    pub path: Vec<u8>,
    pub skip_worktree: bool,
    pub assume_unchanged: bool,
}

impl IndexEntry {
    /// The mode of a submodule's commit.
    pub(crate) const GITLINK: u32 = 0o160000;

    /// Formats the entry for `update-index -z --index-info`.
    pub(crate) fn info(&self) -> Vec<u8> {
        let mut line = format!("{:06o} {} {}\t", self.mode, self.oid, self.stage).into_bytes();
        line.extend_from_slice(&self.path);
        line.push(0);
        line
    }
}

/// One record of a raw diff.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(in crate::workspace) struct Record {
    pub new_mode: u32,
    pub new_oid: String,
    pub path: Vec<u8>,
}

fn bad(what: &str) -> Error {
    Error::new(
        Kind::CommandFailed,
        format!("git: unexpected form of its {what}"),
    )
}

pub(super) fn paths(list: &[u8]) -> Vec<Vec<u8>> {
    list.split(|b| *b == 0)
        .filter(|p| !p.is_empty())
        .map(<[u8]>::to_vec)
        .collect()
}

/// Parses lines `H 100644 <oid> 0\t<path>\0`. A lower-case letter means assume-unchanged; `S` means
/// that the file is not in the work tree.
pub(super) fn index(list: &[u8]) -> Result<Vec<IndexEntry>> {
    list.split(|b| *b == 0)
        .filter(|l| !l.is_empty())
        .map(|l| index_entry(l).ok_or_else(|| bad("index listing")))
        .collect()
}

fn index_entry(line: &[u8]) -> Option<IndexEntry> {
    let tab = line.iter().position(|b| *b == b'\t')?;
    let mut fields = std::str::from_utf8(&line[..tab]).ok()?.split(' ');
    let tag = fields.next()?.chars().next()?;
    let mode = u32::from_str_radix(fields.next()?, 8).ok()?;
    let oid = fields.next().filter(|o| is_oid(o))?.to_owned();
    let stage = fields.next()?.parse().ok().filter(|s| *s <= 3)?;
    Some(IndexEntry {
        mode,
        oid,
        stage,
        path: line[tab + 1..].to_vec(),
        skip_worktree: tag.eq_ignore_ascii_case(&'S'),
        assume_unchanged: tag.is_ascii_lowercase(),
    })
}

/// Parses records `:<old mode> <new mode> <old oid> <new oid> <letter>\0<path>\0`.
pub(super) fn raw_diff(list: &[u8]) -> Result<Vec<Record>> {
    let mut fields = list.split(|b| *b == 0).filter(|f| !f.is_empty());
    let mut out = Vec::new();
    while let Some(head) = fields.next() {
        let path = fields.next().ok_or_else(|| bad("diff"))?.to_vec();
        let head = std::str::from_utf8(head).map_err(|_| bad("diff"))?;
        let words: Vec<&str> = head.split(' ').collect();
        let [_, new_mode, _, new_oid, _] = words[..] else {
            return Err(bad("diff"));
        };
        let new_mode = u32::from_str_radix(new_mode, 8).map_err(|_| bad("diff"))?;
        out.push(Record {
            new_mode,
            new_oid: new_oid.to_owned(),
            path,
        });
    }
    Ok(out)
}

pub(super) fn is_oid(word: &str) -> bool {
    matches!(word.len(), 40 | 64)
        && word
            .bytes()
            .all(|b| b.is_ascii_digit() || (b'a'..=b'f').contains(&b))
}

#[cfg(test)]
mod tests {
    use super::*;

    const OID: &str = "e69de29bb2d1d6434b8b29ae775ad8c2e48c5391";

    #[test]
    fn index_lines_are_parsed() {
        let text = format!(
            "H 100644 {OID} 0\ta b\0s 100755 {OID} 0\tt\tab\nnl\0h 160000 {OID} 0\tsub\0M 120000 {OID} 2\tc\0"
        );
        let entries = index(text.as_bytes()).unwrap();
        let seen: Vec<_> = entries
            .iter()
            .map(|e| {
                (
                    e.mode,
                    e.stage,
                    e.path.as_slice(),
                    e.skip_worktree,
                    e.assume_unchanged,
                )
            })
            .collect();
        assert_eq!(
            seen,
            [
                (0o100644, 0, &b"a b"[..], false, false),
                (0o100755, 0, b"t\tab\nnl", true, true),
                (0o160000, 0, b"sub", false, true),
                (0o120000, 2, b"c", false, false)
            ]
        );
        assert_eq!(
            entries[0].info(),
            format!("100644 {OID} 0\ta b\0").as_bytes()
        );
    }

    #[test]
    fn index_and_diff_in_an_unknown_form_are_rejected() {
        for bad in [
            "x",
            "H 100644 zz 0\ta",
            "H 100644 e69de29bb2d1d6434b8b29ae775ad8c2e48c5391 9\ta",
        ] {
            assert!(index(bad.as_bytes()).is_err(), "{bad}");
        }
        assert!(raw_diff(b":1 2\0p\0").is_err());
    }

    #[test]
    fn raw_diff_records_are_parsed() {
        let text = format!(":000000 100644 {} {OID} A\0n\0", "0".repeat(40));
        assert_eq!(
            raw_diff(text.as_bytes()).unwrap(),
            [Record {
                new_mode: 0o100644,
                new_oid: OID.into(),
                path: b"n".to_vec()
            }]
        );
    }
}
