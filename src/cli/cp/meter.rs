//! Shows how much has been copied: a bar on a terminal, and nothing elsewhere, as with cp.

use super::super::progress::Progress;
use crate::api::op;
use std::time::{Duration, Instant};

/// The shortest interval between two updates of the bar.
const REDRAW: Duration = Duration::from_millis(100);

/// Counts bytes. It belongs to the thread that moves them.
pub(super) struct Meter {
    progress: Progress,
    stage: String,
    done: u64,
    total: Option<u64>,
    shown_at: Option<Instant>,
}

impl Meter {
    /// `stage` names the places of the copy, such as `to web`.
    pub(super) fn new(progress: Progress, stage: &str, total: Option<u64>) -> Self {
        Self {
            progress,
            stage: stage.to_owned(),
            done: 0,
            total,
            shown_at: None,
        }
    }

    pub(super) fn set_total(&mut self, total: Option<u64>) {
        self.total = total;
    }

    pub(super) fn add(&mut self, bytes: u64) {
        self.done += bytes;
        if self.shown_at.is_some_and(|at| at.elapsed() < REDRAW) {
            return;
        }
        self.shown_at = Some(Instant::now());
        self.progress.update(&op::Progress {
            stage: self.stage.clone(),
            done: Some(self.done),
            // The guest only estimates the total. Hide it once it is exceeded.
            total: self.total.filter(|total| *total >= self.done),
            unit: Some("bytes".to_owned()),
            ..op::Progress::default()
        });
    }
}
