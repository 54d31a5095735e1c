//! Progress on stderr: a bar on a terminal, otherwise one line per stage.

use super::output::size;
use crate::api::op;
use crate::host::text::printable;
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use std::fs::File;
use std::io::{IsTerminal, Write};
use std::time::Duration;

const TICK: Duration = Duration::from_millis(120);

/// The progress of one operation. Dropping it clears the bar.
pub(super) struct Progress {
    doing: String,
    shown: Shown,
}

enum Shown {
    Bar(ProgressBar),
    Lines { to: File, stage: String },
    Nothing,
}

impl Progress {
    pub(super) fn silent() -> Self {
        Self {
            doing: String::new(),
            shown: Shown::Nothing,
        }
    }

    pub(super) fn new(doing: &str, stderr: &File) -> Self {
        let shown = if stderr.is_terminal() {
            let bar = ProgressBar::with_draw_target(None, ProgressDrawTarget::stderr());
            bar.set_style(style("{spinner} {prefix} {msg} [{elapsed}]"));
            bar.set_prefix(printable(doing));
            bar.enable_steady_tick(TICK);
            Shown::Bar(bar)
        } else {
            match stderr.try_clone() {
                Ok(to) => Shown::Lines {
                    to,
                    stage: String::new(),
                },
                Err(_) => Shown::Nothing,
            }
        };
        Self {
            doing: printable(doing),
            shown,
        }
    }

    pub(super) fn update(&mut self, progress: &op::Progress) {
        let stage = printable(&progress.stage);
        match &mut self.shown {
            Shown::Nothing => {}
            Shown::Lines { to, stage: last } => {
                if *last != stage {
                    // If stderr cannot be written, there is nowhere left to report it.
                    let _ = to.write_all(format!("fcctl: {}: {stage}\n", self.doing).as_bytes());
                    *last = stage;
                }
            }
            Shown::Bar(bar) => show(bar, stage, progress),
        }
    }
}

fn show(bar: &ProgressBar, stage: String, progress: &op::Progress) {
    let is_bytes = progress.unit.as_deref() == Some("bytes");
    match (progress.done, progress.total) {
        (Some(done), Some(total)) if total > 0 => {
            let figures = if is_bytes {
                "{bytes}/{total_bytes} {bytes_per_sec}"
            } else {
                "{pos}/{len}"
            };
            bar.set_style(style(&format!(
                "{{spinner}} {{prefix}} {{msg}} [{{bar:30}}] {figures}"
            )));
            bar.set_length(total);
            bar.set_position(done.min(total));
            bar.set_message(stage);
        }
        (Some(done), _) => {
            bar.set_style(style("{spinner} {prefix} {msg} [{elapsed}]"));
            let unit = progress.unit.as_deref().unwrap_or_default();
            let done = if is_bytes {
                size(done)
            } else {
                format!("{done} {unit}")
            };
            bar.set_message(format!("{stage}: {}", printable(done.trim_end())));
        }
        _ => {
            bar.set_style(style("{spinner} {prefix} {msg} [{elapsed}]"));
            bar.set_message(stage);
        }
    }
}

fn style(template: &str) -> ProgressStyle {
    ProgressStyle::with_template(template)
        .expect("a valid template")
        .progress_chars("=> ")
}

impl Drop for Progress {
    fn drop(&mut self) {
        if let Shown::Bar(bar) = &self.shown {
            bar.finish_and_clear();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use expect_test::expect;
    use std::io::{Read, Seek};

    #[test]
    fn progress_without_terminal_prints_one_line_per_stage() {
        let mut file = tempfile::tempfile().unwrap();
        let mut progress = Progress::new("start web", &file);
        for (stage, done) in [
            ("boot", 1),
            ("boot", 2),
            ("wait for ssh", 1),
            ("wait for ssh\u{7}", 2),
        ] {
            progress.update(&op::Progress {
                stage: stage.to_owned(),
                done: Some(done),
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
    fn progress_templates_are_valid() {
        let bar = ProgressBar::hidden();
        for (done, total, unit) in [
            (None, None, None),
            (Some(1), None, Some("files")),
            (Some(1), Some(2), Some("bytes")),
            (Some(3), Some(2), None),
        ] {
            let unit = unit.map(str::to_owned);
            show(
                &bar,
                "x".to_owned(),
                &op::Progress {
                    stage: "x".to_owned(),
                    done,
                    total,
                    unit,
                },
            );
        }
        assert_eq!(bar.position(), 2);
    }
}
