//! Output for people and programs: lines, tables, ages, sizes, and guest text made safe for a
//! terminal.

use crate::host::text::{is_plain, printable};
use std::fs::File;
use std::io::{self, Write};

/// An output stream. Once its reader has exited, further output is dropped without an error.
pub(super) struct Out {
    file: File,
    is_broken: bool,
}

impl Out {
    pub(super) fn new(file: File) -> Self {
        Self {
            file,
            is_broken: false,
        }
    }

    pub(super) fn file(&self) -> &File {
        &self.file
    }

    /// True if the reader has exited or the stream cannot be written.
    pub(super) fn is_broken(&self) -> bool {
        self.is_broken
    }

    /// Writes all bytes. Errors other than an exited reader, such as a full disk, are returned.
    pub(super) fn bytes(&mut self, bytes: &[u8]) -> io::Result<()> {
        if self.is_broken {
            return Ok(());
        }
        match self.file.write_all(bytes) {
            Ok(()) => Ok(()),
            Err(e) => {
                self.is_broken = true;
                if e.kind() == io::ErrorKind::BrokenPipe {
                    Ok(())
                } else {
                    Err(e)
                }
            }
        }
    }

    pub(super) fn line(&mut self, text: &str) -> io::Result<()> {
        self.bytes(format!("{text}\n").as_bytes())
    }
}

/// Formats rows under upper-case headers.
pub(super) fn table(headers: &[&str], rows: &[Vec<String>]) -> String {
    let mut table = Table::new(headers);
    rows.iter().flatten().for_each(|cell| table.cell(cell));
    table.render()
}

/// A table with two spaces between columns. The last column is not padded. Cells are kept in one
/// string, because `fcctl ps` may have tens of thousands of them.
pub(super) struct Table {
    text: String,
    cells: Vec<Cell>,
    /// The width of each column.
    widths: Vec<usize>,
    /// The columns that are left out, because no row has text in them.
    empty: Vec<usize>,
}

struct Cell {
    /// The offset in the text at which the cell ends. It begins where the previous cell ends.
    end: usize,
    /// The width of the cell in characters.
    width: usize,
}

impl Table {
    pub(super) fn new(headers: &[&str]) -> Self {
        let mut table = Self {
            text: String::new(),
            cells: Vec::new(),
            widths: vec![0; headers.len()],
            empty: Vec::new(),
        };
        headers.iter().for_each(|header| table.cell(header));
        table
    }

    /// Makes columns optional: they are left out unless a row has text in them. Call this before
    /// adding rows.
    pub(super) fn optional(mut self, columns: &[usize]) -> Self {
        self.empty = columns.to_vec();
        self
    }

    /// Adds the next cell, row by row. Escapes characters that could harm a terminal.
    pub(super) fn cell(&mut self, text: &str) {
        let width = if is_plain(text) {
            self.text.push_str(text);
            text.len()
        } else {
            let harmless = printable(text);
            self.text.push_str(&harmless);
            harmless.chars().count()
        };
        let column = self.cells.len() % self.widths.len();
        self.widths[column] = self.widths[column].max(width);
        if width > 0 && !self.empty.is_empty() {
            self.empty.retain(|empty| *empty != column);
        }
        self.cells.push(Cell {
            end: self.text.len(),
            width,
        });
    }

    pub(super) fn render(&self) -> String {
        const GAP: usize = 2;
        let columns = self.widths.len();
        let line_bytes = self.widths.iter().map(|width| width + GAP).sum::<usize>();
        let mut out = String::with_capacity(self.cells.len() / columns * line_bytes);
        let mut begin = 0;
        for row in self.cells.chunks(columns) {
            let line = out.len();
            for (i, (cell, width)) in row.iter().zip(&self.widths).enumerate() {
                let text = &self.text[begin..cell.end];
                begin = cell.end;
                if self.empty.contains(&i) {
                    continue;
                }
                out.push_str(text);
                if i + 1 < columns {
                    out.extend(std::iter::repeat_n(' ', width + GAP - cell.width));
                }
            }
            out.truncate(line + out[line..].trim_end().len());
            out.push('\n');
        }
        out
    }
}

/// A pattern in which `*` stands for any characters.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct MatchedText(Vec<String>);

impl MatchedText {
    pub(super) fn new(text: &str) -> Self {
        Self(text.split('*').map(str::to_owned).collect())
    }

    pub(super) fn matches(&self, text: &str) -> bool {
        let [first, middle @ .., last] = &self.0[..] else {
            return self.0.iter().all(|only| only == text);
        };
        let rest = text.strip_prefix(first.as_str());
        let Some(mut rest) = rest.and_then(|rest| rest.strip_suffix(last.as_str())) else {
            return false;
        };
        // Matching each part at its first occurrence leaves the most text for the parts after it.
        middle.iter().all(|part| match rest.find(part.as_str()) {
            Some(at) => {
                rest = &rest[at + part.len()..];
                true
            }
            None => false,
        })
    }
}

/// Formats seconds as `5s`, `3m`, `2h` or `4d`.
pub(super) fn span(seconds: u64) -> String {
    match seconds {
        0..60 => format!("{seconds}s"),
        60..3_600 => format!("{}m", seconds / 60),
        3_600..172_800 => format!("{}h", seconds / 3_600),
        _ => format!("{}d", seconds / 86_400),
    }
}

/// Formats how long ago `then` was. Both are seconds since the epoch.
pub(super) fn age(now: u64, then: u64) -> String {
    format!("{} ago", span(now.saturating_sub(then)))
}

/// Formats bytes as `512 MiB` or `1.5 GiB`.
pub(super) fn size(bytes: u64) -> String {
    const UNITS: [&str; 5] = ["B", "KiB", "MiB", "GiB", "TiB"];
    let mut unit = 0;
    while unit + 1 < UNITS.len() && bytes >> (10 * (unit + 1)) > 0 {
        unit += 1;
    }
    let whole = bytes >> (10 * unit);
    // One digit after the point unless it is 0, rounded down.
    let rest = bytes - (whole << (10 * unit));
    let tenth = if unit == 0 {
        0
    } else {
        (u128::from(rest) * 10) >> (10 * unit)
    };
    if tenth == 0 || whole >= 100 {
        format!("{whole} {}", UNITS[unit])
    } else {
        format!("{whole}.{tenth} {}", UNITS[unit])
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use expect_test::expect;
    use std::io::Read;

    #[test]
    fn table_is_aligned_and_harmless() {
        let row = |a: &str, b: &str, c: &str| vec![a.to_owned(), b.to_owned(), c.to_owned()];
        let text = table(
            &["NAME", "STATE", "WHY"],
            &[
                row("web", "running", ""),
                row("brave-otter", "failed", "\u{1b}[31mx\ny"),
            ],
        );
        expect![[r"
            NAME         STATE    WHY
            web          running
            brave-otter  failed   \u{1b}[31mx\ny
        "]]
        .assert_eq(&text);
        assert_eq!(table(&["NAME", "AGE"], &[]), "NAME  AGE\n");
    }

    #[test]
    fn spans_and_sizes_are_readable() {
        let spans: Vec<_> = [0, 59, 60, 3_599, 3_600, 172_799, 172_800].map(span).into();
        assert_eq!(spans, ["0s", "59s", "1m", "59m", "1h", "47h", "2d"]);
        assert_eq!(age(10, 20), "0s ago");
        let sizes: Vec<_> = [0, 1023, 1024, 1536, 512 << 20, 3 << 29, 10 << 30, u64::MAX]
            .map(size)
            .into();
        assert_eq!(
            sizes,
            [
                "0 B",
                "1023 B",
                "1 KiB",
                "1.5 KiB",
                "512 MiB",
                "1.5 GiB",
                "10 GiB",
                "16777215 TiB"
            ]
        );
    }

    #[test]
    fn optional_columns_are_left_out_if_empty() {
        let text = |ports: &str| {
            let mut table = Table::new(&["NAME", "IP", "PORTS", "WHY"]).optional(&[1, 2]);
            for row in [["a", "", "", "x"], ["bb", "", ports, ""]] {
                row.iter().for_each(|cell| table.cell(cell));
            }
            table.render()
        };
        assert_eq!(text(""), "NAME  WHY\na     x\nbb\n");
        assert_eq!(text("80"), "NAME  PORTS  WHY\na            x\nbb    80\n");
    }

    #[test]
    fn stars_match_any_characters() {
        for (pattern, text, expected) in [
            ("web", "web", true),
            ("web", "web-2", false),
            ("web*", "web", true),
            ("web*", "web-2", true),
            ("*web", "my-web", true),
            ("*", "", true),
            ("a*a", "a", false),
            ("a*a", "aa", true),
            ("a*b*c", "a-b-b-c", true),
            ("a*b*c", "a-c-b", false),
            ("*b*b*", "abab", true),
            ("*b*b*", "ab", false),
        ] {
            assert_eq!(
                MatchedText::new(pattern).matches(text),
                expected,
                "{pattern} {text}"
            );
        }
    }

    #[test]
    fn out_reader_exits_drops_output_without_error() {
        let (mut reader, writer) = std::io::pipe().unwrap();
        let mut out = Out::new(File::from(std::os::fd::OwnedFd::from(writer)));
        out.line("one").unwrap();
        let mut first = [0; 4];
        reader.read_exact(&mut first).unwrap();
        assert_eq!(&first, b"one\n");
        drop(reader);
        out.line("two").unwrap();
        assert!(out.is_broken());
        out.line("three").unwrap();
    }

    #[test]
    fn out_full_disk_is_an_error() {
        let mut out = Out::new(File::options().write(true).open("/dev/full").unwrap());
        assert!(out.line("x").is_err());
    }
}
