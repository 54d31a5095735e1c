//! Imports into a VM, either complete or written piece by piece.

use super::Running;
use super::{GUEST_PATH, SOON, World};
use fcd::testing::api::stream::ChunkWriter;
use fcd::testing::api::vm::*;
use fcd::testing::api::workspace::{PrepareRequest, WorkspacePrepare};
use std::io::Write;
use std::os::fd::OwnedFd;

impl World {
    /// Begins an import whose stream the test writes. Returns when the daemon is ready for the
    /// stream.
    pub fn import(&self, name: &str) -> Import {
        let import = self.queue_import(name);
        import.call.ready();
        import
    }

    /// Begins an import without waiting until the daemon is ready for its stream.
    pub fn queue_import(&self, name: &str) -> Import {
        let (read, write) = pipe();
        let call = self.begin::<WorkspacePrepare>(prepare(name), vec![read]);
        Import {
            call,
            stream: std::fs::File::from(write),
        }
    }

    /// Runs a complete import.
    #[track_caller]
    pub fn import_all(&self, name: &str) {
        let Import { mut call, stream } = self.import(name);
        write_payload(stream, b"some payload");
        call.finish(SOON).unwrap_or_else(|e| panic!("import: {e}"));
    }

    pub fn workspace_state(&self, name: &str) -> Option<WorkspaceState> {
        self.show(name).unwrap().workspace.map(|w| w.state)
    }
}

pub struct Import {
    pub call: Running<fcd::testing::api::workspace::PrepareReply>,
    pub stream: std::fs::File,
}

/// Writes a complete stream with its trailer.
pub fn write_payload(stream: std::fs::File, payload: &[u8]) {
    let mut writer = ChunkWriter::new(stream);
    writer.write_all(payload).unwrap();
    drop(writer.finish(3).unwrap());
}

pub fn prepare(vm: &str) -> PrepareRequest {
    PrepareRequest {
        vm: vm.into(),
        guest_path: GUEST_PATH.into(),
        subdir: String::new(),
        readonly: false,
        overwrite: false,
        no_wait: false,
        bytes_expected: None,
        raw_tar: false,
    }
}

/// Creates a pipe. Returns its read end and its write end.
pub fn pipe() -> (OwnedFd, OwnedFd) {
    rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC).unwrap()
}
