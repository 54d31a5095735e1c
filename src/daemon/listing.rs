//! Lists VMs in pieces and releases the store's lock between them, so that long lists do not delay
//! other calls.

use super::access::Caller;
use crate::api::page;
use crate::error::Result;
use crate::store::{Age, Seen, Store, VmRow};
use std::collections::VecDeque;
use std::fmt;
use std::str::FromStr;

/// How many VMs are read each time the store's lock is taken.
const SCAN_MAX: usize = 512;

/// The position of a VM or a snapshot in a listing: the time of its creation, then its ID or name.
#[derive(PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Position<I>(pub u64, pub I);

impl<I: fmt::Display> fmt::Display for Position<I> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}-{}", self.0, self.1)
    }
}

impl<I: FromStr> Position<I> {
    /// Parses a cursor.
    ///
    /// # Errors
    /// `invalid_argument` if the text is not a position.
    pub(super) fn parse(text: &str) -> Result<Self> {
        let parts = || {
            let (at, id) = text.split_once('-')?;
            Some(Self(at.parse().ok()?, id.parse().ok()?))
        };
        parts().ok_or_else(|| page::bad_cursor(text))
    }
}

/// Iterates over the VMs that the caller may see and for which `shown` is true, from the oldest to
/// the newest. Each piece of up to [`SCAN_MAX`] VMs is consistent in itself.
pub(super) struct VmScan<'a, F> {
    store: &'a Store,
    /// The owner whose VMs are listed, or `None` for all owners.
    owner_uid: Option<u32>,
    after: Option<Age>,
    shown: F,
    found: VecDeque<Seen>,
    is_at_end: bool,
}

impl<'a, F: Fn(&VmRow) -> bool> VmScan<'a, F> {
    pub(super) fn new(store: &'a Store, caller: &Caller, after: Option<Age>, shown: F) -> Self {
        let owner_uid = (caller.uid != 0).then_some(caller.uid);
        Self {
            store,
            owner_uid,
            after,
            shown,
            found: VecDeque::new(),
            is_at_end: false,
        }
    }

    fn read_more(&mut self) {
        let (owner_uid, after, shown) = (self.owner_uid, self.after.take(), &self.shown);
        let (found, last, seen) = self.store.read(|s| {
            let (mut found, mut last, mut seen) = (VecDeque::new(), None, 0);
            for row in s.vms_by_age(owner_uid, after.as_ref()).take(SCAN_MAX) {
                if shown(row) {
                    found.push_back(Seen {
                        row: row.clone(),
                        workspace: s.workspace(&row.id).cloned(),
                    });
                }
                (last, seen) = (Some(row), seen + 1);
            }
            (
                found,
                last.map(|row| (row.created_at, row.id.clone())),
                seen,
            )
        });
        // Avoid an extra read at the end, so that a list that fits into one piece is consistent.
        self.is_at_end = seen < SCAN_MAX;
        (self.found, self.after) = (found, last);
    }
}

impl<F: Fn(&VmRow) -> bool> Iterator for VmScan<'_, F> {
    type Item = Seen;

    fn next(&mut self) -> Option<Seen> {
        while self.found.is_empty() && !self.is_at_end {
            self.read_more();
        }
        self.found.pop_front()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::Kind;
    use crate::ids::VmId;

    #[test]
    fn position_round_trips_and_other_text_is_refused() {
        let position = Position(1764400000, "0123456789ab".parse::<VmId>().unwrap());
        assert!(
            Position::parse(&position.to_string())
                .is_ok_and(|read: Position<VmId>| read == position)
        );
        for bad in [
            "",
            "-",
            "5",
            "5-",
            "5-web",
            "x-0123456789ab",
            "-1-0123456789ab",
            "5-0123456789ab-",
        ] {
            assert_eq!(
                Position::<VmId>::parse(bad).err().map(|e| e.kind()),
                Some(Kind::InvalidArgument),
                "{bad:?}"
            );
        }
    }
}
