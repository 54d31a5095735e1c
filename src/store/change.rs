//! Implements the calls that change the store's state in memory and queue the change for the disk.

use super::batch::{Change, Failure, Ticket};
use super::tx::Tx;
use super::{Core, Mode, QUEUE_CHANGES_MAX, Store};
use crate::error::{Error, Kind, Result};

impl Store {
    /// Makes a change. If `change` fails or panics, the state stays as it was. A change is visible
    /// at once, and durable once its ticket has been waited for. Nothing in `change` may block or
    /// take a lock.
    ///
    /// # Errors
    /// Those of `change`, `disk_full` or `store_read_only` while the store is read-only, `busy` if
    /// too many changes wait for the disk, and `shutting_down` after [`Store::close`].
    pub fn change<T>(&self, change: impl FnOnce(&mut Tx) -> Result<T>) -> Result<(T, Ticket)> {
        self.enqueue(false, change)
    }

    /// Makes a change that frees space, such as a delete. In contrast to [`Store::change`], this is
    /// attempted even while the store is read-only or the queue is full, and may use the reserve if
    /// the disk is full.
    pub fn change_essential<T>(
        &self,
        change: impl FnOnce(&mut Tx) -> Result<T>,
    ) -> Result<(T, Ticket)> {
        self.enqueue(true, change)
    }

    /// Makes a change and waits for up to [`DURABLE_WAIT`] until it is durable.
    #[cfg(any(test, feature = "fakes"))]
    pub fn change_durable<T>(&self, change: impl FnOnce(&mut Tx) -> Result<T>) -> Result<T> {
        let (value, ticket) = self.change(change)?;
        ticket.wait(crate::sched::Instant::now() + super::DURABLE_WAIT)?;
        Ok(value)
    }

    fn enqueue<T>(
        &self,
        essential: bool,
        change: impl FnOnce(&mut Tx) -> Result<T>,
    ) -> Result<(T, Ticket)> {
        let inner = &self.0.inner;
        let mut guard = inner.core.lock();
        let core = &mut *guard;
        core.admit(essential)?;
        let mut tx = Tx::new(&mut core.state, &mut core.ledger_next, core.retention);
        let value = change(&mut tx)?;
        let steps = tx.finish();
        if steps.is_empty() {
            // An empty change is durable once all earlier changes are.
            let before = if core.queue.is_empty() {
                core.in_flight.clone()
            } else {
                Some(core.queue.outcome.clone())
            };
            return Ok((value, Ticket::new(core.seq, inner, before)));
        }
        core.watchers.notify(&steps);
        core.seq += 1;
        core.queue.changes.push(Change {
            seq: core.seq,
            essential,
            steps,
        });
        Ok((
            value,
            Ticket::new(core.seq, inner, Some(core.queue.outcome.clone())),
        ))
    }

    /// Returns a ticket for all changes made so far.
    pub fn barrier(&self) -> Result<Ticket> {
        self.change_essential(|_| Ok(())).map(|((), ticket)| ticket)
    }
}

impl Core {
    fn admit(&self, essential: bool) -> Result<()> {
        if self.closing {
            return Err(Failure::closed().to_error());
        }
        if essential {
            return Ok(());
        }
        if let Mode::ReadOnly(failure) = &self.mode {
            return Err(failure.to_error().context("the store is read-only"));
        }
        if self.queue.changes.len() >= QUEUE_CHANGES_MAX {
            let text = format!("{QUEUE_CHANGES_MAX} changes wait for the disk");
            return Err(
                Error::new(Kind::Busy, text).hint("try again in a moment; see fcctl doctor")
            );
        }
        Ok(())
    }
}
