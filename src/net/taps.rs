//! A pool of spare taps. A tap is never reused by another VM, so nothing that a guest did to it can
//! affect the next one.

use super::names::Names;
use super::tools::Tools;
use super::tun;
use crate::error::{Error, Kind, Result};
use crate::host::thread;
use crate::locks::{Cancel, CancelCause, Mutex, Rank};
use crate::sched::JoinHandle;
use std::collections::VecDeque;
use std::sync::Arc;

/// The highest tap number. The tap after it gets number 1 again. An interface name has room for
/// four digits.
const NUMBER_MAX: u32 = 9999;
/// The maximum number of threads that fill the pool.
const MAKERS_MAX: usize = 2;

pub(super) struct Pool {
    names: Names,
    tools: Tools,
    target: usize,
    closing: Cancel,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    ready: VecDeque<String>,
    /// The last number that was used in the name of a tap.
    last: u32,
    making: usize,
    makers: Vec<JoinHandle<()>>,
    is_closed: bool,
}

impl Pool {
    /// Creates an empty pool. `last` is the highest number among the taps on the host.
    pub(super) fn new(names: Names, tools: Tools, target: usize, last: u32) -> Result<Arc<Self>> {
        let closing = Cancel::try_new().map_err(|e| Error::io("create an eventfd", e))?;
        let state = Mutex::new(
            Rank::Taps,
            State {
                last,
                ..State::default()
            },
        );
        Ok(Arc::new(Self {
            names,
            tools,
            target,
            closing,
            state,
        }))
    }

    /// Takes a tap that is ready. Returns None if there is none.
    pub(super) fn pop(&self) -> Option<String> {
        self.state.lock().ready.pop_front()
    }

    /// Returns the number of taps that are ready.
    #[cfg(test)]
    pub(super) fn ready(&self) -> usize {
        self.state.lock().ready.len()
    }
    #[cfg(test)]
    pub(super) fn making(&self) -> usize {
        self.state.lock().making
    }

    /// Creates a tap that root owns, that is down and without addresses, and that has the alias of
    /// a spare tap.
    pub(super) fn make(&self, cancel: &Cancel) -> Result<String> {
        for _ in 0..NUMBER_MAX {
            let name = self.names.tap(self.next_number());
            if !tun::create(&name)? {
                continue;
            }
            let tagged = self.tools.ip_batch(
                &[format!(
                    "link set dev {name} alias {} addrgenmode none",
                    self.names.spare()
                )],
                cancel,
            );
            if let Err(e) = tagged {
                self.remove(&[name]);
                return Err(e.context("tag a tap"));
            }
            return Ok(name);
        }
        Err(Error::new(
            Kind::Exhausted,
            format!("create a tap: all {NUMBER_MAX} names are in use"),
        )
        .hint("run fcctl doctor --leaks"))
    }

    fn next_number(&self) -> u32 {
        let mut state = self.state.lock();
        state.last = state.last % NUMBER_MAX + 1;
        state.last
    }

    /// Starts threads that fill the pool in the background, unless it is full or closed.
    pub(super) fn refill(self: &Arc<Self>) {
        loop {
            {
                let mut state = self.state.lock();
                state.makers.retain(|m| !m.is_finished());
                let wanted = state.ready.len() + state.making < self.target;
                if !wanted || state.is_closed || state.makers.len() >= MAKERS_MAX {
                    return;
                }
                state.making += 1;
            }
            let pool = self.clone();
            match thread::spawn("taps", move || pool.fill()) {
                Ok(maker) => self.state.lock().makers.push(maker),
                Err(e) => {
                    self.state.lock().making -= 1;
                    log::warn!("create spare taps: {e}");
                    return;
                }
            }
        }
    }

    /// Creates taps until the pool is full. The caller has counted this thread in `making`; this
    /// function subtracts the thread at its end.
    fn fill(&self) {
        loop {
            let name = match self.make(&self.closing) {
                Ok(name) => name,
                Err(e) => return self.give_up(&e),
            };
            let mut state = self.state.lock();
            let surplus = if state.is_closed {
                Some(name)
            } else {
                state.ready.push_back(name);
                None
            };
            // `making` also counts this thread, for the next tap that it would create.
            if state.is_closed || state.ready.len() + state.making > self.target {
                state.making -= 1;
                drop(state);
                self.remove(surplus.as_slice());
                return;
            }
        }
    }

    /// Ends a [`Pool::fill`] that could not create a tap.
    fn give_up(&self, e: &Error) {
        let is_closed = {
            let mut state = self.state.lock();
            state.making -= 1;
            state.is_closed
        };
        if !is_closed {
            log::warn!("create spare taps: {e}");
        }
    }

    /// Removes these taps. A failure is only logged.
    pub(super) fn remove(&self, names: &[String]) {
        if names.is_empty() {
            return;
        }
        let lines: Vec<_> = names
            .iter()
            .map(|name| format!("link delete dev {name}"))
            .collect();
        if let Err(e) = self.tools.ip_batch_all(&lines) {
            log::warn!("remove taps: {e}");
        }
    }

    /// Stops creating taps, waits for the threads that create them, and removes the spare taps.
    pub(super) fn close(&self) {
        let (makers, ready) = {
            let mut state = self.state.lock();
            state.is_closed = true;
            (
                std::mem::take(&mut state.makers),
                std::mem::take(&mut state.ready),
            )
        };
        self.closing.cancel(CancelCause::Finished);
        crate::locks::may_block("join");
        for maker in makers {
            if maker.join().is_err() {
                log::error!("a thread that creates taps panicked");
            }
        }
        self.remove(&Vec::from(ready));
    }
}
