//! Progress on stderr: bars on a terminal, otherwise one line per stage.
//!
//! On a terminal, an operation has one bar and, below it, one per part, such as a layer of an
//! image. Each takes one line, and only as many parts are shown as the terminal has lines for.

use super::output::size;
use super::terminal;
use crate::api::exec::PtySize;
use crate::api::op::{self, Part, PartState, most_relevant};
use crate::host::text::printable;
use indicatif::{MultiProgress, ProgressBar, ProgressDrawTarget, ProgressStyle};
use std::fs::File;
use std::io::{IsTerminal, Write};
use std::time::Duration;

const TICK: Duration = Duration::from_millis(120);
/// A terminal with fewer columns shows figures but no bars.
const COLUMNS_FOR_BARS: u16 = 76;
/// The approximate width of a bar and its figures.
const FIGURES_COLUMNS: usize = 60;
/// The lines of a terminal that no part uses: the operation's own bar and the line of the cursor.
const OTHER_ROWS: u16 = 2;

/// The progress of one operation. Dropping it clears the bars.
pub(super) struct Progress {
    doing: String,
    shown: Shown,
}

enum Shown {
    Bars(Bars, File),
    Lines { to: File, stage: String },
    Nothing,
}

/// The bars on a terminal.
struct Bars {
    all: MultiProgress,
    whole: ProgressBar,
    parts: Vec<ProgressBar>,
}

impl Progress {
    pub(super) fn silent() -> Self {
        Self {
            doing: String::new(),
            shown: Shown::Nothing,
        }
    }

    pub(super) fn new(doing: &str, stderr: &File, is_dumb: bool) -> Self {
        let doing = printable(doing);
        let shown = match stderr.try_clone() {
            Ok(to) if to.is_terminal() && !is_dumb => {
                let bars = Bars::new(&doing, ProgressDrawTarget::stderr());
                bars.whole.enable_steady_tick(TICK);
                Shown::Bars(bars, to)
            }
            Ok(to) => Shown::Lines {
                to,
                stage: String::new(),
            },
            Err(_) => Shown::Nothing,
        };
        Self { doing, shown }
    }

    pub(super) fn update(&mut self, progress: &op::Progress) {
        match &mut self.shown {
            Shown::Nothing => {}
            Shown::Lines { to, stage: last } => {
                let stage = printable(&progress.stage);
                if *last != stage {
                    // If stderr cannot be written, there is nowhere left to report it.
                    let _ = to.write_all(format!("fcctl: {}: {stage}\n", self.doing).as_bytes());
                    *last = stage;
                }
            }
            Shown::Bars(bars, stderr) => {
                let size = terminal::size(stderr).unwrap_or(terminal::DEFAULT_SIZE);
                bars.show(&self.doing, progress, size);
            }
        }
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        if let Shown::Bars(bars, _) = &self.shown {
            bars.clear();
        }
    }
}

impl Bars {
    fn new(doing: &str, target: ProgressDrawTarget) -> Self {
        let all = MultiProgress::with_draw_target(target);
        let whole = all.add(ProgressBar::no_length());
        whole.set_style(style("{spinner} {wide_msg}"));
        whole.set_message(doing.to_owned());
        Self {
            all,
            whole,
            parts: Vec::new(),
        }
    }

    fn show(&mut self, doing: &str, progress: &op::Progress, size: PtySize) {
        self.show_whole(doing, progress, size);
        let max = size.rows.saturating_sub(OTHER_ROWS);
        let parts = most_relevant(progress.parts.clone(), max.into());
        while self.parts.len() > parts.len() {
            if let Some(bar) = self.parts.pop() {
                self.all.remove(&bar);
            }
        }
        while self.parts.len() < parts.len() {
            self.parts.push(self.all.add(ProgressBar::no_length()));
        }
        let unit = progress.unit.as_deref().unwrap_or_default();
        for (bar, part) in self.parts.iter().zip(&parts) {
            show_part(bar, part, unit, size);
        }
    }

    fn show_whole(&self, doing: &str, progress: &op::Progress, size: PtySize) {
        let bar = &self.whole;
        let is_bytes = progress.unit.as_deref() == Some("bytes");
        let stage = printable(&progress.stage);
        match (progress.done, progress.total) {
            (Some(done), Some(total)) if total > 0 && size.cols >= COLUMNS_FOR_BARS => {
                let figures = if is_bytes {
                    "{bytes}/{total_bytes} {bytes_per_sec}"
                } else {
                    "{pos}/{len}"
                };
                bar.set_length(total);
                bar.set_position(done.min(total));
                bar.set_style(style(&format!(
                    "{{spinner}} {{wide_msg}} [{{bar:20}}] {figures}"
                )));
                let all = format!("{doing} {stage}");
                let fits = all.chars().count() + FIGURES_COLUMNS <= size.cols.into();
                bar.set_message(if fits { all } else { stage });
            }
            // A narrow terminal has room for the stage, but not for the name of the operation.
            _ if size.cols < COLUMNS_FOR_BARS && !stage.is_empty() => {
                bar.set_style(style("{spinner} {wide_msg}"));
                bar.set_message(printable(&line(progress)));
            }
            _ => {
                bar.set_style(style("{spinner} {wide_msg} [{elapsed}]"));
                bar.set_message(format!("{doing} {}", printable(&line(progress))));
            }
        }
    }

    fn clear(&self) {
        for bar in self.parts.iter().rev().chain([&self.whole]) {
            bar.finish_and_clear();
        }
    }
}

fn show_part(bar: &ProgressBar, part: &Part, unit: &str, size: PtySize) {
    let has_bar = part.state == PartState::Downloading && size.cols >= COLUMNS_FOR_BARS;
    bar.set_style(style(if has_bar {
        "  {prefix} [{bar:20}] {wide_msg}"
    } else {
        "  {prefix} {wide_msg}"
    }));
    bar.set_length(part.total);
    bar.set_position(part.done.min(part.total));
    bar.set_prefix(printable(&part.name));
    bar.set_message(printable(&part_line(part, unit)));
}

/// Describes progress in one line, such as `copy: 1 MiB of 4 MiB (25%)`.
pub(super) fn line(progress: &op::Progress) -> String {
    let unit = progress.unit.as_deref().unwrap_or_default();
    match (progress.done, progress.total) {
        (Some(done), Some(total)) if total > 0 => {
            let percent = u128::from(done.min(total)) * 100 / u128::from(total);
            format!(
                "{}: {} of {} ({percent}%)",
                progress.stage,
                amount(done, unit),
                amount(total, unit)
            )
        }
        (Some(done), _) => format!("{}: {}", progress.stage, amount(done, unit)),
        _ => progress.stage.clone(),
    }
}

/// Describes a part without its name, such as `downloading, 1 MiB of 4 MiB`.
pub(super) fn part_line(part: &Part, unit: &str) -> String {
    let total = amount(part.total, unit);
    match part.state {
        PartState::Downloading => format!("downloading, {} of {total}", amount(part.done, unit)),
        state => format!("{}, {total}", state.name()),
    }
}

fn amount(n: u64, unit: &str) -> String {
    if unit == "bytes" {
        size(n)
    } else {
        format!("{n} {unit}").trim_end().to_owned()
    }
}

fn style(template: &str) -> ProgressStyle {
    ProgressStyle::with_template(template)
        .expect("a valid template")
        .progress_chars("=> ")
}

#[cfg(test)]
#[path = "progress_tests.rs"]
mod tests;
