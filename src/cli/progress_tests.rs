use super::*;
use crate::locks::{Mutex, Rank};
use expect_test::expect;
use indicatif::TermLike;
use std::io::{self, Read, Seek};
use std::sync::Arc;

#[test]
fn progress_without_terminal_prints_one_line_per_stage() {
    let mut file = tempfile::tempfile().unwrap();
    let mut progress = Progress::new("start web", &file, false);
    for (stage, done) in [
        ("boot", 1),
        ("boot", 2),
        ("wait for ssh", 1),
        ("wait for ssh\u{7}", 2),
    ] {
        progress.update(&op::Progress {
            stage: stage.to_owned(),
            done: Some(done),
            parts: layers(3),
            ..Default::default()
        });
    }
    let mut text = String::new();
    file.rewind().unwrap();
    file.read_to_string(&mut text).unwrap();
    expect![[r"
        fcctl: start web: boot
        fcctl: start web: wait for ssh
        fcctl: start web: wait for ssh\u{7}
    "]]
    .assert_eq(&text);
}

#[test]
fn progress_line_is_readable() {
    let shown = |done, total, unit: &str| {
        line(&op::Progress {
            stage: "copy".to_owned(),
            done,
            total,
            unit: Some(unit.to_owned()).filter(|u| !u.is_empty()),
            ..Default::default()
        })
    };
    assert_eq!(shown(None, None, ""), "copy");
    assert_eq!(shown(Some(3), None, "files"), "copy: 3 files");
    assert_eq!(
        shown(Some(1 << 20), Some(4 << 20), "bytes"),
        "copy: 1 MiB of 4 MiB (25%)"
    );
    assert_eq!(shown(Some(9), Some(4), ""), "copy: 9 of 4 (100%)");
    assert_eq!(shown(Some(9), Some(0), ""), "copy: 9");
}

/// A terminal that stores the content of its screen.
#[derive(Clone)]
struct Screen(Arc<Mutex<Cells>>, PtySize);

#[derive(Default)]
struct Cells {
    lines: Vec<Vec<char>>,
    row: usize,
    /// The cursor's column. If it equals the number of columns, the next character begins a new
    /// line.
    column: usize,
    /// The highest number of lines that were in use at any time.
    rows_max: usize,
}

impl Cells {
    fn put(&mut self, c: char, columns: usize) {
        match c {
            '\r' => self.column = 0,
            '\n' => (self.row, self.column) = (self.row + 1, 0),
            c => {
                if self.column == columns {
                    (self.row, self.column) = (self.row + 1, 0);
                }
                if self.lines.len() <= self.row {
                    self.lines.resize(self.row + 1, vec![' '; columns]);
                }
                self.lines[self.row][self.column] = c;
                self.column += 1;
                self.rows_max = self.rows_max.max(self.row + 1);
            }
        }
    }
}

impl Screen {
    fn new(rows: u16, columns: u16) -> Self {
        let cells = Mutex::new(Rank::Consoles, Cells::default());
        Self(
            Arc::new(cells),
            PtySize {
                rows,
                cols: columns,
            },
        )
    }

    /// Returns the lines with text.
    fn lines(&self) -> Vec<String> {
        let cells = self.0.lock();
        let lines = cells
            .lines
            .iter()
            .map(|line| line.iter().collect::<String>());
        let lines = lines.map(|line| line.trim_end().to_owned());
        lines.filter(|line| !line.is_empty()).collect()
    }

    fn bars(&self, doing: &str) -> Bars {
        let target = ProgressDrawTarget::term_like_with_hz(Box::new(self.clone()), 255);
        Bars::new(doing, target)
    }

    /// Shows the progress and draws at once, even if the last draw was only a moment ago.
    fn show(&self, bars: &mut Bars, doing: &str, progress: &op::Progress) {
        bars.show(doing, progress, self.1);
        bars.whole.force_draw();
    }
}

impl std::fmt::Debug for Screen {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{:?}", self.1)
    }
}

impl TermLike for Screen {
    fn width(&self) -> u16 {
        self.1.cols
    }
    fn height(&self) -> u16 {
        self.1.rows
    }
    fn move_cursor_up(&self, n: usize) -> io::Result<()> {
        let mut cells = self.0.lock();
        cells.row = cells.row.saturating_sub(n);
        Ok(())
    }
    fn move_cursor_down(&self, n: usize) -> io::Result<()> {
        self.0.lock().row += n;
        Ok(())
    }
    fn move_cursor_right(&self, _: usize) -> io::Result<()> {
        Ok(())
    }
    fn move_cursor_left(&self, _: usize) -> io::Result<()> {
        Ok(())
    }
    fn write_line(&self, s: &str) -> io::Result<()> {
        self.write_str(s)?;
        self.write_str("\n")
    }
    fn write_str(&self, s: &str) -> io::Result<()> {
        let mut cells = self.0.lock();
        s.chars().for_each(|c| cells.put(c, self.1.cols.into()));
        Ok(())
    }
    fn clear_line(&self) -> io::Result<()> {
        let mut cells = self.0.lock();
        let row = cells.row;
        if let Some(line) = cells.lines.get_mut(row) {
            line.fill(' ');
        }
        cells.column = 0;
        Ok(())
    }
    fn flush(&self) -> io::Result<()> {
        Ok(())
    }
}

/// Returns layers in all states.
fn layers(count: u64) -> Vec<Part> {
    let states = [
        PartState::Cached,
        PartState::Done,
        PartState::Downloading,
        PartState::Waiting,
    ];
    (0..count)
        .map(|n| Part {
            name: format!("{n:012x}"),
            state: states[n as usize % 4],
            done: 5 << 20,
            total: 20 << 20,
        })
        .collect()
}

fn fetching(parts: Vec<Part>) -> op::Progress {
    op::Progress {
        stage: "fetch the layers".to_owned(),
        done: Some(10 << 20),
        total: Some(40 << 20),
        unit: Some("bytes".to_owned()),
        parts_total: Some(parts.len() as u64),
        parts,
    }
}

#[test]
fn each_part_has_a_line_on_a_terminal() {
    let screen = Screen::new(24, 100);
    let mut bars = screen.bars("pull gcc:13");
    screen.show(&mut bars, "pull gcc:13", &fetching(layers(4)));
    let lines = screen.lines();
    assert!(
        lines[0].contains("pull gcc:13 fetch the layers")
            && lines[0].contains("10.00 MiB/40.00 MiB"),
        "{lines:?}"
    );
    let parts = [
        "  000000000000 cached, 20 MiB",
        "  000000000001 done, 20 MiB",
        "  000000000002 [=====>              ] downloading, 5 MiB of 20 MiB",
        "  000000000003 waiting, 20 MiB",
    ];
    assert_eq!(lines[1..], parts);
    // The next stage has no parts.
    screen.show(&mut bars, "pull gcc:13", &fetching(Vec::new()));
    assert_eq!(screen.lines().len(), 1, "{:?}", screen.lines());
    bars.clear();
    assert_eq!(screen.lines(), [""; 0]);
}

#[test]
fn many_parts_fit_into_small_terminal() {
    let doing = "pull ghcr.io/some-owner/some-image:tag";
    for (rows, columns, count) in [
        (24, 40, 40),
        (24, 80, 127),
        (5, 40, 40),
        (2, 30, 4),
        (1, 30, 3),
    ] {
        let screen = Screen::new(rows, columns);
        let mut bars = screen.bars(doing);
        for _ in 0..3 {
            screen.show(&mut bars, doing, &fetching(layers(count)));
        }
        let lines = screen.lines();
        assert!(lines[0].contains("fetch the layers"), "{lines:#?}");
        let shown = (rows - 1).clamp(1, count as u16 + 1);
        assert_eq!(
            lines.len(),
            usize::from(shown),
            "{rows} x {columns}: {lines:#?}"
        );
        assert_eq!(screen.0.lock().rows_max, usize::from(shown), "{lines:#?}");
        bars.clear();
        assert_eq!(screen.lines(), [""; 0], "{rows} x {columns}");
    }
}

#[test]
fn every_kind_of_progress_can_be_shown() {
    let screen = Screen::new(24, 80);
    let mut bars = screen.bars("x");
    for (done, total, unit) in [
        (None, None, None),
        (Some(1), None, Some("files")),
        (Some(1), Some(2), Some("bytes")),
        (Some(3), Some(2), None),
    ] {
        let progress = op::Progress {
            stage: "stage".to_owned(),
            done,
            total,
            unit: unit.map(str::to_owned),
            ..Default::default()
        };
        bars.show("x", &progress, screen.1);
    }
    assert_eq!(bars.whole.position(), 2);
}
