//! Taps made ahead. A VM's tap is never used again: what a guest did to it goes with it.

use super::names::Names;
use super::tools::Tools;
use super::tun;
use crate::error::{Error, Kind, Result};
use crate::host::thread;
use crate::locks::{Cancel, Mutex, Rank};
use std::collections::VecDeque;
use std::sync::Arc;
use std::thread::JoinHandle;

/// Numbers end here and begin anew: four digits fit an interface's name.
const NUMBER_MAX: u32 = 9999;
/// Threads that fill the pool.
const MAKERS_MAX: usize = 2;

pub struct Pool {
    names: Names,
    tools: Tools,
    target: usize,
    closing: Cancel,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    ready: VecDeque<String>,
    /// The number that was given last.
    last: u32,
    making: usize,
    makers: Vec<JoinHandle<()>>,
    is_closed: bool,
}

impl Pool {
    /// `last`: the highest number of a tap that is on the host.
    pub fn new(names: Names, tools: Tools, target: usize, last: u32) -> Result<Arc<Self>> {
        let closing = Cancel::try_new().map_err(|e| Error::io("make an eventfd", e))?;
        let state = Mutex::new(Rank::Taps, State { last, ..State::default() });
        Ok(Arc::new(Self { names, tools, target, closing, state }))
    }

    /// One that is ready.
    pub fn pop(&self) -> Option<String> {
        self.state.lock().ready.pop_front()
    }

    /// How many are ready.
    pub fn ready(&self) -> usize {
        self.state.lock().ready.len()
    }

    /// A new one: root's, down, no addresses of its own, with the alias of those that wait.
    pub fn make(&self, cancel: &Cancel) -> Result<String> {
        for _ in 0..NUMBER_MAX {
            let name = self.names.tap(self.next_number());
            if !tun::create(&name)? {
                continue;
            }
            let tagged =
                self.tools.ip_batch(&[format!("link set dev {name} alias {} addrgenmode none", self.names.waiting())], cancel);
            if let Err(e) = tagged {
                self.remove(&[name]);
                return Err(e.context("tag a tap"));
            }
            return Ok(name);
        }
        Err(Error::new(Kind::Exhausted, format!("create a tap: {NUMBER_MAX} are there")).hint("run fcctl doctor --leaks"))
    }

    fn next_number(&self) -> u32 {
        let mut state = self.state.lock();
        state.last = state.last % NUMBER_MAX + 1;
        state.last
    }

    /// Fills up in the background.
    pub fn refill(self: &Arc<Self>) {
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
                    log::warn!("make taps ahead: {e}");
                    return;
                }
            }
        }
    }

    /// Makes taps until there are enough. It has one place in `making`, which it gives back.
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
            // The others' places and our own: one of them is the next that we make.
            if state.is_closed || state.ready.len() + state.making > self.target {
                state.making -= 1;
                drop(state);
                self.remove(surplus.as_slice());
                return;
            }
        }
    }

    /// Ends a [`Pool::fill`] that could not make a tap.
    fn give_up(&self, e: &Error) {
        let is_closed = {
            let mut state = self.state.lock();
            state.making -= 1;
            state.is_closed
        };
        if !is_closed {
            log::warn!("make taps ahead: {e}");
        }
    }

    /// Removes these; those that are gone already do no harm.
    pub fn remove(&self, names: &[String]) {
        if names.is_empty() {
            return;
        }
        let lines: Vec<_> = names.iter().map(|name| format!("link delete dev {name}")).collect();
        if let Err(e) = self.tools.ip_batch_all(&lines) {
            log::warn!("remove taps: {e}");
        }
    }

    /// No more are made; those that are ready are removed.
    pub fn close(&self) {
        let (makers, ready) = {
            let mut state = self.state.lock();
            state.is_closed = true;
            (std::mem::take(&mut state.makers), std::mem::take(&mut state.ready))
        };
        self.closing.cancel("the daemon ends");
        for maker in makers {
            if maker.join().is_err() {
                log::error!("a thread that makes taps panicked");
            }
        }
        self.remove(&Vec::from(ready));
    }
}
