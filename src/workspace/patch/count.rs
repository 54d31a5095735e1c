//! Counts the files that a patch changes, as `git apply` would see them, while the patch streams
//! by.
//!
//! The patch comes from a guest, so the guest's own count proves nothing. The counter keeps only
//! the beginning of the current line and a few numbers, so its memory is bounded.
//!
//! A file whose type changed has two entries in a patch, a deletion and a creation, but counts
//! once. A forged patch can use this to halve its count, but not to reduce it further.

/// Maximum number of bytes of a line that are kept. They are enough to classify the line, and
/// include the numbers of a hunk's header.
const LINE_BYTES_KEPT: usize = 128;

const GIT_HEADER: &[u8] = b"diff --git ";

/// The numbers of lines of the old file and of the new file that the current hunk still has to
/// list.
#[derive(Clone, Copy, Debug, Default)]
struct Hunk {
    old: u64,
    new: u64,
}

impl Hunk {
    fn is_over(self) -> bool {
        self.old == 0 && self.new == 0
    }
}

/// The position of the current line in a patch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Place {
    /// The line is between files or after a hunk. git ignores every line here that is not a header.
    Outside,
    /// The line is after a `diff --git` and before the file's first hunk. A `---` here belongs to
    /// that file.
    GitHeader,
    /// The line is after a `---` that has no `diff --git` before it.
    OldName,
    /// The line is after such a `---` and its `+++`. If a hunk follows, it counts as a file.
    NewName,
}

/// The `diff --git` line of the current file, and whether the patch deletes that file.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Section {
    /// A hash of the whole line.
    name: u64,
    is_deletion: bool,
}

#[derive(Debug)]
pub(super) struct Counter {
    files: u64,
    place: Place,
    hunk: Hunk,
    line: Vec<u8>,
    /// A hash of the current line, if the line is a `diff --git`.
    name: u64,
    section: Section,
    /// True if the patch deleted a file with the same name just before the current one. If the
    /// current file is created, its type changed.
    follows_deletion: bool,
}

impl Default for Counter {
    fn default() -> Self {
        Self {
            files: 0,
            place: Place::Outside,
            hunk: Hunk::default(),
            line: Vec::with_capacity(LINE_BYTES_KEPT),
            name: FNV_BASIS,
            section: Section::default(),
            follows_deletion: false,
        }
    }
}

impl Counter {
    pub(super) fn push(&mut self, mut bytes: &[u8]) {
        while let Some(end) = bytes.iter().position(|b| *b == b'\n') {
            self.extend(&bytes[..end]);
            self.end_line();
            bytes = &bytes[end + 1..];
        }
        self.extend(bytes);
    }

    /// Returns the number of files that the patch creates, deletes or changes.
    pub(super) fn finish(mut self) -> u64 {
        if !self.line.is_empty() {
            self.end_line();
        }
        self.files
    }

    fn extend(&mut self, bytes: &[u8]) {
        let kept = bytes.len().min(LINE_BYTES_KEPT - self.line.len());
        self.line.extend_from_slice(&bytes[..kept]);
        if self.line.starts_with(GIT_HEADER) || GIT_HEADER.starts_with(&self.line) {
            self.name = bytes.iter().fold(self.name, |hash, b| {
                (hash ^ u64::from(*b)).wrapping_mul(FNV_PRIME)
            });
        }
    }

    fn end_line(&mut self) {
        let mut line = std::mem::take(&mut self.line);
        let name = std::mem::replace(&mut self.name, FNV_BASIS);
        if self.hunk.is_over() || !self.take_hunk_line(&line) {
            self.hunk = Hunk::default();
            self.place = self.take_header_line(&line, name);
        }
        line.clear();
        self.line = line;
    }

    fn take_header_line(&mut self, line: &[u8], name: u64) -> Place {
        match self.place {
            _ if line.starts_with(GIT_HEADER) => {
                self.files += 1;
                self.follows_deletion = self.section
                    == Section {
                        name,
                        is_deletion: true,
                    };
                self.section = Section {
                    name,
                    is_deletion: false,
                };
                Place::GitHeader
            }
            Place::GitHeader | Place::NewName | Place::Outside if line.starts_with(b"@@ -") => {
                self.files += u64::from(self.place == Place::NewName);
                self.hunk = parse_hunk(line).unwrap_or_default();
                Place::Outside
            }
            Place::GitHeader if !line.is_empty() => {
                self.section.is_deletion |= line.starts_with(b"deleted file mode ");
                if line.starts_with(b"new file mode ") && std::mem::take(&mut self.follows_deletion)
                {
                    self.files -= 1;
                }
                Place::GitHeader
            }
            Place::OldName if line.starts_with(b"+++ ") => Place::NewName,
            _ if line.starts_with(b"--- ") => Place::OldName,
            _ => Place::Outside,
        }
    }

    /// Counts a line of the current hunk. Returns false if the line cannot belong to the hunk. git
    /// ends the hunk at such a line.
    fn take_hunk_line(&mut self, line: &[u8]) -> bool {
        let Hunk { old, new } = self.hunk;
        let next = match line.first() {
            // Mail programs strip the space from an empty context line.
            None | Some(b' ') => old.checked_sub(1).zip(new.checked_sub(1)),
            Some(b'-') => old.checked_sub(1).map(|old| (old, new)),
            Some(b'+') => new.checked_sub(1).map(|new| (old, new)),
            // The line `\ No newline at end of file` counts for neither file.
            Some(b'\\') => Some((old, new)),
            Some(_) => None,
        };
        if let Some((old, new)) = next {
            self.hunk = Hunk { old, new };
        }
        next.is_some()
    }
}

const FNV_BASIS: u64 = 0xcbf2_9ce4_8422_2325;
const FNV_PRIME: u64 = 0x0100_0000_01b3;

/// Parses a hunk's header, `@@ -1,2 +3,4 @@`. A missing count is 1. Returns `None` for an invalid
/// header.
fn parse_hunk(line: &[u8]) -> Option<Hunk> {
    let text = std::str::from_utf8(line.split(|b| !b.is_ascii()).next()?).ok()?;
    let mut ranges = text.strip_prefix("@@ -")?.split(' ');
    let count = |range: &str| match range.split_once(',') {
        Some((_, count)) => count.parse().ok(),
        None => Some(1),
    };
    Some(Hunk {
        old: count(ranges.next()?)?,
        new: count(ranges.next()?.strip_prefix('+')?)?,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check(patch: &str, files: u64) {
        for step in [1, 7, patch.len().max(1)] {
            let mut counter = Counter::default();
            patch
                .as_bytes()
                .chunks(step)
                .for_each(|piece| counter.push(piece));
            assert_eq!(counter.finish(), files, "in pieces of {step}: {patch}");
        }
    }

    #[test]
    fn count_of_patches_from_git_is_the_number_of_files() {
        check("", 0);
        check(
            "diff --git a/x b/x\nnew file mode 100644\nindex 0..1\n--- /dev/null\n+++ b/x\n@@ -0,0 +1 @@\n+x\n",
            1,
        );
        // A file without content, in a patch without a final newline.
        check("diff --git a/x b/x\nnew file mode 100644\nindex 0..0", 1);
        check(
            "diff --git a/x b/x\nold mode 100644\nnew mode 100755\ndiff --git a/y b/y\ndeleted file mode 100644\n",
            2,
        );
        check(
            "diff --git a/x b/x\nindex 0..1 100644\nGIT binary patch\nliteral 3\nKcmZ\n\nliteral 0\nHcmV\n\n",
            1,
        );
    }

    #[test]
    fn count_of_a_type_change_is_one() {
        let gone = "diff --git a/x b/x\ndeleted file mode 100644\n--- a/x\n+++ /dev/null\n@@ -1 +0,0 @@\n-x\n";
        let link = "diff --git a/x b/x\nnew file mode 120000\n--- /dev/null\n+++ b/x\n@@ -0,0 +1 @@\n+a\n\\ No newline at end of file\n";
        check(&format!("{gone}{link}"), 1);
        // The names differ only beyond the part of the line that is kept.
        let other = format!("{gone}{link}").replace(
            "git a/x b/x",
            &format!("git a/{0}1 b/{0}1", "d".repeat(300)),
        );
        check(&other, 1);
        check(&other.replacen("1\n", "2\n", 1), 2);
        // Several files follow the same `diff --git` line, so that line alone does not identify a
        // file.
        let renamed = "diff --git a/x b/x\nrename from p\nrename to q\n";
        check(&renamed.repeat(3), 3);
        check(&format!("{gone}{link}{link}{link}"), 3);
    }

    #[test]
    fn count_ignores_headers_inside_hunks() {
        let hunk = "@@ -1,3 +1,3 @@\n--- a/fake\n+++ b/fake\n @@ -1 +1 @@\n-diff --git a/z b/z\n+diff --git a/z b/z\n";
        check(
            &format!(
                "diff --git a/x b/x\n--- a/x\n+++ b/x\n{hunk}@@ -9 +9 @@ fn \u{e9}()\n-a\n+b\n"
            ),
            1,
        );
    }

    #[test]
    fn count_includes_formats_that_only_git_apply_accepts() {
        let old_style = "--- a/x\n+++ b/x\n@@ -0,0 +1 @@\n+x\n";
        check(old_style, 1);
        check(
            &format!("some text\n{old_style}{}", old_style.replace('x', "y")),
            2,
        );
        check(
            &format!("diff --git a/w b/w\n--- a/w\n+++ b/w\n@@ -1 +1 @@\n-a\n+b\n{old_style}"),
            2,
        );
        // Names without a hunk change nothing.
        check("--- a/x\n+++ b/x\n", 0);
        // A hunk with an endless claimed length hides nothing: git ends it at the first line that
        // cannot belong to it.
        check(
            "diff --git a/x b/x\n--- a/x\n+++ b/x\n@@ -1,99 +1,99 @@\n x\ndiff --git a/y b/y\nnew file mode 100644\n",
            2,
        );
    }

    #[test]
    fn memory_stays_bounded_on_an_endless_line() {
        let mut counter = Counter::default();
        for _ in 0..1000 {
            counter.push(&[b'x'; 4096]);
        }
        assert!(counter.line.capacity() <= LINE_BYTES_KEPT);
        assert_eq!(counter.finish(), 0);
    }
}
