//! Finds the files with a `filter` attribute, which git-lfs, git-crypt and nbstripout use.
//!
//! git stores different content for such a file than the tree has, and only the filter can convert
//! between the two. No filter ever runs here. Therefore a file counts as unchanged if its metadata
//! still equals what the index recorded, and its content is never compared.

use super::Git;
use crate::error::{Error, Kind, Result};
use crate::workspace::beneath::Beneath;
use rustix::fs::Stat;
use std::collections::{BTreeMap, BTreeSet, HashMap};

/// Files covered by filters that the caller has configured.
#[derive(Debug, Default)]
pub(in crate::workspace) struct Filtered {
    /// How many files each filter covers.
    pub counts: BTreeMap<Vec<u8>, u64>,
    /// Tracked files that are unchanged since git checked them out or added them, sorted.
    pub unchanged: Vec<Vec<u8>>,
}

/// The metadata that git recorded when a file last matched its index entry. git keeps 32 bits of
/// each field.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Recorded {
    seconds: u32,
    nanoseconds: u32,
    size: u32,
}

impl Recorded {
    fn fits(self, stat: &Stat) -> bool {
        let nanoseconds = self.nanoseconds == 0 || self.nanoseconds == stat.st_mtime_nsec as u32;
        self.seconds == stat.st_mtime as u32 && nanoseconds && self.size == stat.st_size as u32
    }
}

impl Git {
    /// Finds the files with a filter. `paths` are the files of the tree; `configured` names the
    /// filters that the caller's git would run.
    pub(crate) fn filtered(
        &self,
        paths: &[&[u8]],
        configured: &BTreeSet<Vec<u8>>,
        beneath: &mut Beneath,
    ) -> Result<Filtered> {
        if configured.is_empty() || paths.is_empty() {
            return Ok(Filtered::default());
        }
        let mut stdin = paths.join(&0);
        stdin.push(0);
        let command = self
            .commands
            .command(&["check-attr", "-z", "--stdin", "filter"])
            .stdin(stdin);
        let (_, answer) = self.commands.ask_status(&command, &[0])?;
        let mut out = Filtered::default();
        let mut covered = Vec::new();
        // The answer consists of NUL-terminated triples of path, attribute and value.
        let fields: Vec<&[u8]> = answer.split(|b| *b == 0).collect();
        for record in fields.chunks_exact(3) {
            if configured.contains(record[2]) {
                *out.counts.entry(record[2].to_vec()).or_default() += 1;
                covered.push(record[0].to_vec());
            }
        }
        if !covered.is_empty() {
            let recorded = parse_recorded(&self.commands.ask(&["ls-files", "--debug", "-z"])?)?;
            let unchanged = |path: &Vec<u8>| {
                recorded
                    .get(path)
                    .is_some_and(|known| beneath.stat(path).is_ok_and(|stat| known.fits(&stat)))
            };
            out.unchanged = covered.into_iter().filter(unchanged).collect();
            out.unchanged.sort_unstable();
        }
        Ok(out)
    }
}

/// Parses `ls-files --debug -z`: a path, NUL, then five lines of numbers.
fn parse_recorded(list: &[u8]) -> Result<HashMap<Vec<u8>, Recorded>> {
    let bad = || {
        Error::new(
            Kind::CommandFailed,
            "git: unexpected output of ls-files --debug",
        )
    };
    let mut out = HashMap::new();
    let mut left = list;
    while !left.is_empty() {
        let end = left.iter().position(|b| *b == 0).ok_or_else(bad)?;
        let (path, rest) = (&left[..end], &left[end + 1..]);
        let length = rest
            .iter()
            .enumerate()
            .filter(|(_, b)| **b == b'\n')
            .nth(4)
            .ok_or_else(bad)?
            .0
            + 1;
        let text = std::str::from_utf8(&rest[..length]).map_err(|_| bad())?;
        let after = |key: &str| text.split_once(key).map(|(_, value)| value).ok_or_else(bad);
        let number = |text: &str| -> Result<u32> {
            let digits: String = text
                .trim_start()
                .chars()
                .take_while(char::is_ascii_digit)
                .collect();
            digits.parse().map_err(|_| bad())
        };
        let (seconds, rest_of_time) = after("mtime:")?.split_once(':').ok_or_else(bad)?;
        let recorded = Recorded {
            seconds: number(seconds)?,
            nanoseconds: number(rest_of_time)?,
            size: number(after("size:")?)?,
        };
        out.insert(path.to_vec(), recorded);
        left = &rest[length..];
    }
    Ok(out)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parse_recorded_reads_times_and_sizes() {
        let text = b"a\nb\0  ctime: 1:2\n  mtime: 30:40\n  dev: 5\tino: 6\n  uid: 7\tgid: 8\n  size: 90\tflags: 0\n\
            c\0  ctime: 0:0\n  mtime: 0:0\n  dev: 0\tino: 0\n  uid: 0\tgid: 0\n  size: 0\tflags: 200000\n";
        let seen = parse_recorded(text).unwrap();
        assert_eq!(
            seen[&b"a\nb"[..]],
            Recorded {
                seconds: 30,
                nanoseconds: 40,
                size: 90
            }
        );
        assert_eq!(seen.len(), 2);
        for bad in [&b"x"[..], b"x\0 mtime: 1\n", b"x\0\n\n\n\n\n"] {
            assert!(parse_recorded(bad).is_err());
        }
    }
}
