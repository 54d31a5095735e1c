//! Sends console logs. A request thread never waits for a VMM here: it reads files and waits in
//! `poll`.

use super::access::Caller;
use super::sessions::Sessions;
use super::waiting::{Gone, Hangup};
use crate::api::vm::{LogChunk, LogsReply, VmLogsRequest};
use crate::error::Result;

impl Sessions {
    /// Sends the log, and with `follow` everything that is added to it until the VM is deleted, the
    /// caller hangs up or the daemon closes.
    pub fn logs(
        &self,
        caller: &Caller,
        request: &VmLogsRequest,
        reader: Hangup<'_>,
        send: &mut dyn FnMut(LogChunk) -> std::io::Result<()>,
    ) -> Result<LogsReply> {
        crate::locks::may_block("file access");
        let row = self.core.resolve(caller, &request.vm)?;
        // The first start creates the directory. A VM that was never started has no log.
        let is_there = self.core.vm_dir(&row.id).exists()
            || (request.follow && self.views.wait_directory(&row.id, reader)?);
        if !is_there {
            return Ok(LogsReply { bytes: 0 });
        }
        let mut follower = self
            .vmms
            .vmm
            .consoles()
            .follow(&self.core.vm_dir(&row.id), request.tail)?;
        let mut bytes = 0;
        loop {
            while let Some(text) = follower.next_chunk()? {
                bytes += text.len() as u64;
                send(LogChunk { text }).map_err(|_| Gone)?;
            }
            if !request.follow || follower.is_ended() || self.core.closing.is_cancelled() {
                return Ok(LogsReply { bytes });
            }
            match reader.wait(&[follower.fd(), self.core.closing.fd()], None) {
                Ok(_) => {}
                Err(gone) => return Err(gone.into()),
            }
        }
    }
}
