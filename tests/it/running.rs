//! A call in progress. A separate thread reads the call's notes and result.

use crate::world::soon;
use fcd::testing::api::Call;
use fcd::testing::api::frame::Note;
use fcd::testing::client::{Client, Event, Failure, Hangup};
use fcd::testing::ids::OpId;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::time::{Duration, Instant};

enum Told<R> {
    Note(Note),
    Ended(Result<R, Failure>, Instant),
}

/// A call in progress.
pub struct Running<R> {
    events: Receiver<Told<R>>,
    hangup: Hangup,
    ended: Option<(Result<R, Failure>, Instant)>,
    pub method: &'static str,
}

impl<R: serde::de::DeserializeOwned + Send + 'static> Running<R> {
    pub fn begin<C: Call<Reply = R>>(
        mut client: Client,
        request: C::Request,
        fds: Vec<OwnedFd>,
    ) -> Self
    where
        C::Request: Send + 'static,
    {
        let hangup = client.hangup().unwrap();
        let (send, events) = channel();
        fcd::testing::host::thread::spawn("client", move || {
            let fds: Vec<_> = fds;
            let borrowed: Vec<_> = fds.iter().map(AsFd::as_fd).collect();
            let mut flight = match client.begin::<C>(&request, &borrowed) {
                Ok(flight) => flight,
                Err(e) => return drop(send.send(Told::Ended(Err(e), Instant::now()))),
            };
            drop(fds);
            loop {
                let told = match flight.next_event() {
                    Ok(Event::Note(note)) => Told::Note(note),
                    Ok(Event::Reply(reply)) => Told::Ended(Ok(reply), Instant::now()),
                    Err(e) => Told::Ended(Err(e), Instant::now()),
                };
                let is_last = matches!(told, Told::Ended(..));
                if send.send(told).is_err() || is_last {
                    return;
                }
            }
        })
        .unwrap();
        Self {
            events,
            hangup,
            ended: None,
            method: C::METHOD,
        }
    }
}

impl<R> Running<R> {
    fn next(&self, deadline: Instant) -> Option<Told<R>> {
        match self
            .events
            .recv_timeout(deadline.saturating_duration_since(Instant::now()))
        {
            Ok(told) => Some(told),
            Err(RecvTimeoutError::Timeout) => None,
            Err(RecvTimeoutError::Disconnected) => {
                panic!("{}: the thread that reads its replies died", self.method)
            }
        }
    }

    /// Waits for the first note that `wanted` accepts. Panics if the call ends first, or on a
    /// timeout.
    #[track_caller]
    pub fn note<T>(&self, wanted: impl Fn(&Note) -> Option<T>) -> T {
        let deadline = soon();
        loop {
            match self.next(deadline) {
                Some(Told::Note(note)) => {
                    if let Some(found) = wanted(&note) {
                        return found;
                    }
                }
                Some(Told::Ended(Err(e), _)) => {
                    panic!("{} ended before the note: {e}", self.method)
                }
                Some(Told::Ended(Ok(_), _)) => panic!("{} succeeded before the note", self.method),
                None => panic!("{}: no such note arrived in time", self.method),
            }
        }
    }

    #[track_caller]
    pub fn op(&self) -> OpId {
        self.note(|n| {
            if let Note::Op { op } = n {
                Some(op.clone())
            } else {
                None
            }
        })
    }
    #[track_caller]
    pub fn ready(&self) {
        self.note(|n| matches!(n, Note::Ready(_)).then_some(()));
    }
    #[track_caller]
    pub fn stage(&self, stage: &str) {
        self.note(|n| matches!(n, Note::Progress(p) if p.stage.contains(stage)).then_some(()));
    }
    #[track_caller]
    pub fn bytes(&self, done: u64) {
        self.note(|n| matches!(n, Note::Progress(p) if p.done == Some(done)).then_some(()));
    }

    /// Waits for the result. Panics after `patience`.
    #[track_caller]
    pub fn finish(&mut self, patience: Duration) -> Result<R, Failure> {
        self.finish_at(patience).0
    }

    /// Waits for the result. Returns `None` if `is_over` returns true first. Panics on a timeout.
    #[track_caller]
    pub fn finish_unless(&mut self, is_over: impl Fn() -> bool) -> Option<Result<R, Failure>> {
        const LOOK: Duration = Duration::from_millis(1);
        let deadline = soon();
        loop {
            match self.next(Instant::now() + LOOK) {
                Some(Told::Ended(result, _)) => return Some(result),
                _ if is_over() => return None,
                _ => assert!(
                    Instant::now() < deadline,
                    "{} has not ended in time",
                    self.method
                ),
            }
        }
    }

    /// Waits for the result. Also returns the time at which it arrived. Panics after `patience`.
    #[track_caller]
    pub fn finish_at(&mut self, patience: Duration) -> (Result<R, Failure>, Instant) {
        if let Some(ended) = self.ended.take() {
            return ended;
        }
        let deadline = Instant::now() + patience;
        loop {
            match self.next(deadline) {
                Some(Told::Note(_)) => {}
                Some(Told::Ended(result, at)) => return (result, at),
                None => panic!("{} has not ended within {patience:?}", self.method),
            }
        }
    }

    pub fn has_ended(&mut self) -> bool {
        while self.ended.is_none() {
            match self.events.try_recv() {
                Ok(Told::Note(_)) => {}
                Ok(Told::Ended(result, at)) => self.ended = Some((result, at)),
                Err(_) => return false,
            }
        }
        true
    }

    /// Closes the connection, as if the client had been killed.
    pub fn hang_up(&self) {
        self.hangup.hang_up();
    }
}
