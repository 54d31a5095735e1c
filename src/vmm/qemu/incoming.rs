//! Splits and parses the JSON lines of QEMU's monitor. It does no I/O, so that it can be fuzzed.
//!
//! A guest may control the VMM, so the parser keeps at most one line and parses at most
//! [`LINE_BYTES_MAX`] bytes at once, regardless of the input.

use crate::host::text::printable;
use crate::sched::Instant;
use crate::vmm::shutdown_cause::Cause;
use serde::Deserialize;
use serde_json::Value;

/// The longest line that is accepted. QEMU's longest answer to a driver, `query-blockstats`, has a
/// few kilobytes. `serde_json` rejects more than 128 levels of nesting.
pub(crate) const LINE_BYTES_MAX: usize = 64 * 1024;
/// The burst of lines that a conversation may receive in addition to [`LINES_PER_S`]. A healthy
/// QEMU sends a few events per minute.
pub(crate) const LINES_MAX: u32 = 2000;
/// The number of lines that a conversation may receive per second.
pub(crate) const LINES_PER_S: u32 = 100;

/// The maximum lengths of a refusal's class and description in an error.
const CLASS_CHARS_MAX: usize = 64;
const DESC_CHARS_MAX: usize = 512;

#[derive(Debug, Deserialize, PartialEq)]
pub(crate) struct Message {
    #[serde(rename = "QMP")]
    pub greeting: Option<Value>,
    #[serde(rename = "return")]
    pub answer: Option<Value>,
    pub error: Option<Refusal>,
    pub event: Option<String>,
    pub data: Option<Value>,
}

impl Message {
    /// Returns the reason why the VMM is about to end, if this message contains it.
    pub(crate) fn shutdown_cause(&self) -> Option<Cause> {
        let data = self
            .data
            .as_ref()
            .filter(|_| self.event.as_deref() == Some("SHUTDOWN"))?;
        Cause::parse(data.get("reason")?.as_str()?)
    }
}

#[derive(Debug, Deserialize, PartialEq)]
pub(crate) struct Refusal {
    pub class: String,
    pub desc: String,
}

impl Refusal {
    /// Returns the refusal as one line of limited length without control characters.
    pub(crate) fn text(&self, doing: &str) -> String {
        let bounded = |text: &str, max: usize| text.chars().take(max).collect::<String>();
        let (class, desc) = (
            bounded(&self.class, CLASS_CHARS_MAX),
            bounded(&self.desc, DESC_CHARS_MAX),
        );
        printable(&format!("{doing}: {class}: {desc}"))
    }
}

/// The reason why the connection can no longer be used.
#[derive(Debug)]
pub(crate) enum Unusable {
    TooLong,
    NotQmp(serde_json::Error),
}

/// Received bytes that are not a complete message yet.
#[derive(Debug, Default)]
pub(crate) struct Incoming {
    buffer: Vec<u8>,
    /// The part of the buffer before this index has no line feed.
    searched: usize,
}

impl Incoming {
    pub(crate) fn push(&mut self, bytes: &[u8]) {
        self.buffer.extend_from_slice(bytes);
    }

    /// Returns the next message, or None if more bytes are needed. Call this method until it
    /// returns None before the next [`Incoming::push`].
    pub(crate) fn message(&mut self) -> Result<Option<Message>, Unusable> {
        let end = self.buffer[self.searched..]
            .iter()
            .position(|b| *b == b'\n')
            .map(|at| self.searched + at);
        if end.unwrap_or(self.buffer.len()) > LINE_BYTES_MAX {
            return Err(Unusable::TooLong);
        }
        let Some(end) = end else {
            self.searched = self.buffer.len();
            return Ok(None);
        };
        let parsed = serde_json::from_slice(&self.buffer[..end]);
        self.buffer.drain(..=end);
        self.searched = 0;
        parsed.map(Some).map_err(Unusable::NotQmp)
    }

    #[cfg(any(test, feature = "fuzz"))]
    pub(crate) fn buffered(&self) -> usize {
        self.buffer.len()
    }
}

/// A token bucket for the number of lines of a conversation.
#[derive(Debug)]
pub(crate) struct Budget {
    lines: u32,
    since: Instant,
}

impl Budget {
    pub(crate) fn new(now: Instant) -> Self {
        Self {
            lines: LINES_MAX,
            since: now,
        }
    }

    /// Counts one line. Returns false if the budget is exhausted.
    pub(crate) fn spend(&mut self, now: Instant) -> bool {
        let seconds = now.saturating_duration_since(self.since).as_secs();
        if seconds > 0 {
            let more = u32::try_from(seconds)
                .unwrap_or(u32::MAX)
                .saturating_mul(LINES_PER_S);
            self.lines = self.lines.saturating_add(more).min(LINES_MAX);
            self.since = now;
        }
        match self.lines.checked_sub(1) {
            Some(left) => self.lines = left,
            None => return false,
        }
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    fn all(pieces: &[&[u8]]) -> Result<usize, Unusable> {
        let (mut incoming, mut messages) = (Incoming::default(), 0);
        for piece in pieces {
            incoming.push(piece);
            while incoming.message()?.is_some() {
                messages += 1;
            }
        }
        Ok(messages)
    }

    #[test]
    fn messages_are_found_in_any_pieces() {
        let text = b"{\"return\": {}}\r\n{\"event\": \"RESUME\"}\n{\"return\": [1]}\n{\"ret";
        for cut in 0..text.len() {
            assert_eq!(all(&[&text[..cut], &text[cut..]]).unwrap(), 3, "{cut}");
        }
    }

    #[test]
    fn shutdown_event_contains_cause() {
        let cause = |line: &str| {
            serde_json::from_str::<Message>(line)
                .unwrap()
                .shutdown_cause()
        };
        let event = |name: &str, data: &str| {
            format!(r#"{{"event": "{name}", "data": {data}, "timestamp": {{}}}}"#)
        };
        assert_eq!(
            cause(&event(
                "SHUTDOWN",
                r#"{"guest": true, "reason": "guest-reset"}"#
            )),
            Some(Cause::GuestReset)
        );
        assert_eq!(
            cause(&event(
                "SHUTDOWN",
                r#"{"guest": false, "reason": "host-signal"}"#
            )),
            Some(Cause::Host("host-signal"))
        );
        for (name, data) in [
            ("SHUTDOWN", "{}"),
            ("SHUTDOWN", "7"),
            ("SHUTDOWN", r#"{"reason": 7}"#),
        ] {
            assert_eq!(cause(&event(name, data)), None, "{data}");
        }
        assert_eq!(cause(&event("RESET", r#"{"reason": "guest-reset"}"#)), None);
        assert_eq!(cause(r#"{"return": {"reason": "guest-reset"}}"#), None);
    }

    #[test]
    fn line_above_bound_is_rejected_even_if_incomplete() {
        let long = [
            b"{\"return\": \"",
            vec![b'x'; LINE_BYTES_MAX].as_slice(),
            b"\"}\n",
        ]
        .concat();
        assert!(matches!(all(&[&long]), Err(Unusable::TooLong)));
        assert!(matches!(
            all(&[&long[..LINE_BYTES_MAX + 1]]),
            Err(Unusable::TooLong)
        ));
        let fits = [
            b"{\"return\": \"",
            vec![b'x'; LINE_BYTES_MAX - 14].as_slice(),
            b"\"}\n",
        ]
        .concat();
        assert_eq!(all(&[&fits]).unwrap(), 1);
    }

    #[test]
    fn deep_nesting_is_rejected() {
        let deep = [b"{\"return\": ", vec![b'['; 10_000].as_slice(), b"\n"].concat();
        assert!(matches!(all(&[&deep]), Err(Unusable::NotQmp(_))));
    }

    #[test]
    fn budget_limits_flood_and_refills() {
        let begun = Instant::now();
        let mut budget = Budget::new(begun);
        assert_eq!(
            (0..2 * LINES_MAX).filter(|_| budget.spend(begun)).count() as u32,
            LINES_MAX
        );
        let later = begun + Duration::from_secs(3);
        assert_eq!(
            (0..2 * LINES_MAX).filter(|_| budget.spend(later)).count() as u32,
            3 * LINES_PER_S
        );
        let much_later = later + Duration::from_secs(u64::from(u32::MAX) * 2);
        assert_eq!(
            (0..2 * LINES_MAX)
                .filter(|_| budget.spend(much_later))
                .count() as u32,
            LINES_MAX
        );
    }
}
