//! Makes a layer from an image's file system, in a helper process.

use super::helper::NAME;
use super::messages::{MESSAGE_BYTES_MAX, Message, Order};
use crate::error::{Error, Kind, Result};
use crate::host::Credentials;
use crate::host::confine::{self, Helper};
use crate::host::wait::{WaitResult, cancelled_by, wait_any};
use crate::image::pull::{decode, encode};
use crate::locks::Cancel;
use crate::sched::Instant;
use nix::poll::PollFlags;
use std::fs::File;
use std::os::fd::AsFd;
use std::time::Duration;

/// How long the helper may be silent. It reports after each file, and a file may be large.
const SILENCE_MAX: Duration = Duration::from_secs(600);

/// The layer to make.
pub(super) struct LayerSpec<'a> {
    pub(super) disk: &'a File,
    /// An empty file.
    pub(super) layer: &'a File,
    /// The size limit of the layer.
    pub(super) bytes_max: u64,
    /// The uid and gid of the helper, if the daemon is root.
    pub(super) helper: Option<Credentials>,
}

/// Writes all files of an ext4 file system to a tar archive. `progress` receives the bytes done.
pub(super) fn make(
    spec: &LayerSpec<'_>,
    cancel: &Cancel,
    progress: &mut dyn FnMut(u64),
) -> Result<()> {
    let helper = confine::spawn(NAME, spec.helper)?;
    let order = encode(&Order {
        bytes_max: spec.bytes_max,
    });
    let fds = [spec.disk.as_fd(), spec.layer.as_fd()];
    helper
        .channel
        .send(&order, &fds)
        .map_err(|e| Error::io("write to the image helper", e))?;
    loop {
        match next(&helper, cancel)? {
            Message::Progress(bytes) => progress(bytes),
            Message::Done => return Ok(()),
            Message::Failed(failure) => return Err(failure.into_error()),
        }
    }
}

/// Waits for the helper's next message.
fn next(helper: &Helper, cancel: &Cancel) -> Result<Message> {
    let violation = |what: &str| {
        let text = format!("the helper process that reads the image {what}");
        Error::new(Kind::Host, text).hint("do not trust this image")
    };
    let deadline = Instant::now() + SILENCE_MAX;
    let mut buffer = vec![0; MESSAGE_BYTES_MAX];
    loop {
        match helper.channel.receive(&mut buffer) {
            Ok(0) => return Err(violation("died")),
            Ok(len) => {
                return decode(&buffer[..len]).ok_or_else(|| violation("sent a malformed message"));
            }
            Err(e) if e.kind() == std::io::ErrorKind::WouldBlock => {}
            Err(e) => return Err(Error::io("read from the image helper", e)),
        }
        let fds = [(helper.channel.fd(), PollFlags::POLLIN)];
        let waited = wait_any(&fds, deadline, cancel);
        match waited.map_err(|e| Error::io("wait for the image helper", e))? {
            WaitResult::Ready => {}
            WaitResult::Cancelled => return Err(cancelled_by(cancel)),
            WaitResult::Deadline => return Err(violation("reported nothing for too long")),
        }
    }
}
