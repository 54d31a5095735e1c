//! Saving and loading a snapshot.

use super::{AFTER, BEFORE, Outcome, State, Vmm, deserializing};
use crate::vsock::listen_for_vsock;
use serde_json::Value;
use std::fs::File;

impl Vmm {
    /// Writes the paths of the VM's disks to both files. The real files contain memory and device
    /// state.
    pub(super) fn save(&mut self, body: &Value) -> Outcome {
        match self.state {
            State::NotStarted => return Err(BEFORE.to_owned()),
            State::Running => {
                return Err("Create snapshot error: Cannot save the microVM state: Operation not allowed: save/restore unavailable while running".into());
            }
            State::Paused => {}
        }
        let opened = |field: &str| {
            let path = body[field].as_str().ok_or_else(|| {
                deserializing(&format!("missing field `{field}` at line 1 column 2."))
            })?;
            let file = File::options()
                .write(true)
                .create(true)
                .truncate(true)
                .open(path);
            file.map_err(|e| {
                format!(
                    "Create snapshot error: Cannot perform open on the snapshot backing file: {e}"
                )
            })
        };
        let saved = (&self.paths, &self.drives, &self.networks, &self.vsock);
        for field in ["snapshot_path", "mem_file_path"] {
            serde_json::to_writer(opened(field)?, &saved)
                .map_err(|e| format!("Create snapshot error: {e}"))?;
        }
        Ok(None)
    }

    /// Loads a snapshot. After a failure is answered, the process ends.
    pub(super) fn load(&mut self, body: &Value) -> Outcome {
        let failed = |why: String| {
            Err(format!(
                "Load snapshot error: Failed to restore from snapshot: {why}"
            ))
        };
        if self.state != State::NotStarted {
            return Err(AFTER.to_owned());
        }
        if self.kernel.is_some() || !self.paths.is_empty() {
            return Err(
                "Load snapshot error: Loading a microVM snapshot not allowed after configuring boot-specific resources.".into()
            );
        }
        self.is_ending = true;
        let (state, memory) = (
            body["snapshot_path"].as_str(),
            body["mem_backend"]["backend_path"].as_str(),
        );
        let (disks, drives, networks, vsock): (Vec<String>, _, _, Option<String>) =
            match File::open(state.unwrap_or_default())
                .map_err(|e| e.to_string())
                .and_then(|file| serde_json::from_reader(file).map_err(|e| e.to_string()))
            {
                Ok(saved) => saved,
                Err(e) => {
                    return failed(format!(
                        "Failed to get snapshot state from file: Failed to open snapshot file: {e}"
                    ));
                }
            };
        if let Err(e) = File::open(memory.unwrap_or_default()) {
            return failed(format!(
                "Failed to load guest memory: Error creating guest memory from file: {e}"
            ));
        }
        if body["network_overrides"]
            .as_array()
            .into_iter()
            .flatten()
            .any(|net| net["iface_id"] != "eth0")
        {
            return failed(
                "Failed to get snapshot state from file: Unknown Network Device.".into(),
            );
        }
        for disk in disks {
            if let Err(e) = File::open(&disk) {
                return failed(format!(
                    "Failed to build microVM from snapshot: Failed to restore devices: Error restoring MMIO devices: Block: VirtioBackend(BackingFile({e:?}, {disk:?}))"
                ));
            }
        }
        if let Some(Err(e)) = vsock.as_deref().map(listen_for_vsock) {
            return failed(format!(
                "Failed to build microVM from snapshot: Failed to restore devices: Error restoring MMIO devices: VsockUnixBackend: Error binding to the host-side Unix socket: {e}"
            ));
        }
        (self.drives, self.networks, self.vsock) = (drives, networks, vsock);
        self.is_ending = false;
        self.state = if body["resume_vm"] == true {
            State::Running
        } else {
            State::Paused
        };
        self.say("the guest resumes\n");
        Ok(None)
    }
}
