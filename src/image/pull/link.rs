//! Connects the helper's threads with the daemon: they send their requests to the thread that owns
//! the channel, and wait for the answer.

use super::protocol::{Found, Progress, Request};
use crate::error::{Error, Result};
use crossbeam_channel::{Sender, bounded};
use std::fs::File;

/// The daemon's answer to a request.
#[derive(Debug)]
pub(super) enum Answer {
    None,
    /// A complete file, for reading.
    Cached(File),
    /// An empty file.
    Empty(File),
    /// A partial download.
    Partial(File),
}

/// A request of one thread, and the sender for its answer.
pub(super) type Asking = (Request, Sender<Result<Answer>>);

/// Sends requests to the thread that owns the channel.
#[derive(Clone)]
pub(super) struct Link(Sender<Asking>);

/// The file of a layer.
pub(super) enum LayerFile {
    /// The layer's tar archive.
    Cached(File),
    Empty(File),
}

impl Link {
    pub(super) fn new(asking: Sender<Asking>) -> Self {
        Self(asking)
    }

    fn ask(&self, request: Request) -> Result<Answer> {
        let ended = || Error::internal("the thread of the channel has ended");
        let (to, answer) = bounded(1);
        self.0.send((request, to)).map_err(|_| ended())?;
        answer.recv().map_err(|_| ended())?
    }

    /// Reports the image, and waits until the daemon has decided to pull it.
    pub(super) fn found(&self, found: Found) -> Result<()> {
        self.ask(Request::Found(found)).map(drop)
    }

    pub(super) fn layer(&self, diff_id: &str) -> Result<LayerFile> {
        let diff_id = diff_id.to_owned();
        match self.ask(Request::Layer { diff_id })? {
            Answer::Cached(file) => Ok(LayerFile::Cached(file)),
            Answer::Empty(file) => Ok(LayerFile::Empty(file)),
            _ => Err(Error::internal("the daemon passed no file")),
        }
    }

    pub(super) fn stored(&self, diff_id: String, blob: String) -> Result<()> {
        self.ask(Request::Stored { diff_id, blob }).map(drop)
    }

    /// Returns the file that keeps the received bytes of a blob for a later pull, or None if the
    /// daemon has no such file.
    pub(super) fn partial(&self, digest: &str) -> Result<Option<File>> {
        let digest = digest.to_owned();
        match self.ask(Request::Partial { digest })? {
            Answer::Partial(file) => Ok(Some(file)),
            _ => Ok(None),
        }
    }

    /// Returns an empty file.
    pub(super) fn file(&self) -> Result<File> {
        match self.ask(Request::File)? {
            Answer::Empty(file) => Ok(file),
            _ => Err(Error::internal("the daemon passed no file")),
        }
    }

    pub(super) fn progress(&self, progress: Progress) {
        // If the daemon does not listen any more, the next request fails.
        let _ = self.ask(Request::Progress(progress));
    }
}
