//! Distinguishes a VMM that hangs from a slow one.

use super::GuestEvent;
use std::time::Duration;

/// How long a VMM may take to answer. A healthy VMM takes a millisecond, or a second on a very busy
/// host. Firecracker handles one request at a time and takes seconds for a snapshot of a large
/// guest.
pub(super) const ANSWER_DEADLINE: Duration = Duration::from_secs(4);
/// A VMM that has missed this many deadlines in a row is unresponsive.
const MISSES_MAX: u32 = 3;
/// How long to wait between two queries.
pub(super) const PING_PERIOD: Duration = Duration::from_secs(5);

/// Counts the deadlines that a VMM has missed in a row, and reports when it is unresponsive and
/// when it answers again.
#[derive(Default)]
pub(super) struct Silence {
    misses: u32,
}

impl Silence {
    pub(super) fn missed(&mut self, on_event: &dyn Fn(GuestEvent)) {
        self.misses += 1;
        // Report this repeatedly, because the daemon may not have recorded this VM at the time of
        // the first report.
        if self.misses.is_multiple_of(MISSES_MAX) {
            on_event(GuestEvent::Unresponsive(true));
        }
    }

    pub(super) fn answered(&mut self, on_event: &dyn Fn(GuestEvent)) {
        if std::mem::take(&mut self.misses) >= MISSES_MAX {
            on_event(GuestEvent::Unresponsive(false));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::cell::RefCell;

    #[test]
    fn third_miss_is_reported_and_the_next_answer() {
        let reports = RefCell::new(Vec::new());
        let mut silence = Silence::default();
        let mut hear = |answers: &[bool]| {
            for answered in answers {
                let report = |event| {
                    if let GuestEvent::Unresponsive(is_unresponsive) = event {
                        reports.borrow_mut().push(is_unresponsive);
                    }
                };
                if *answered {
                    silence.answered(&report);
                } else {
                    silence.missed(&report);
                }
            }
            reports.take()
        };
        assert_eq!(hear(&[false, false, true, false, false]), [false; 0]);
        assert_eq!(hear(&[false]), [true]);
        assert_eq!(hear(&[false, false, false]), [true]);
        assert_eq!(hear(&[true, true]), [false]);
        assert_eq!(hear(&[false, false]), [false; 0]);
    }
}
