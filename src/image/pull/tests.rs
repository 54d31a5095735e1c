//! Tests of a pull whose helper process misbehaves as if an image had taken it over.

use super::cache::Layers;
use super::protocol::{Found, Order, Progress, Request, decode, encode};
use super::session::{Observer, Session};
use crate::error::{Error, Kind, Result};
use crate::host::confine::Channel;
use crate::host::hex;
use crate::host::wait::poll_until;
use crate::locks::{Cancel, CancelCause};
use nix::poll::{PollFd, PollFlags};
use sha2::{Digest, Sha256};
use std::fs::File;
use std::io::{Read, Write};
use std::process::ExitCode;

/// This helper's name for [`crate::host::confine::spawn`].
pub(crate) const NAME: &str = "image-hostile";

/// The helper's end of the channel.
struct Daemon(Channel);

impl Daemon {
    fn receive(&self) -> (Order, Vec<File>) {
        let mut buffer = vec![0; 64 << 10];
        loop {
            poll_until(&mut [PollFd::new(self.0.fd(), PollFlags::POLLIN)], None).unwrap();
            let Ok(received) = self.0.receive_with_fds(&mut buffer) else {
                continue;
            };
            let Some(order) = decode(&buffer[..received.len]) else {
                std::process::exit(0);
            };
            return (order, received.fds.into_iter().map(File::from).collect());
        }
    }

    fn send(&self, message: &[u8]) {
        let _ = self.0.send(message, &[]);
    }

    fn layer(&self, diff_id: &str) -> File {
        let diff_id = diff_id.to_owned();
        self.send(&encode(&Request::Layer { diff_id }));
        self.receive().1.remove(0)
    }

    /// Reports that a layer is complete, and that it came from the blob of [`Daemon::partial`].
    fn stored(&self, diff_id: &str) {
        let (diff_id, blob) = (diff_id.to_owned(), id(b"blob"));
        self.send(&encode(&Request::Stored { diff_id, blob }));
    }

    /// Writes a part of a blob.
    fn partial(&self) {
        let digest = id(b"blob");
        self.send(&encode(&Request::Partial { digest }));
        let (order, mut files) = self.receive();
        assert_eq!(order, Order::Partial);
        files.remove(0).write_all(b"bl").unwrap();
    }
}

/// Runs the helper. The text of the job chooses what the helper does.
pub(crate) fn run() -> ExitCode {
    let daemon = Daemon(Channel::inherited());
    let (_, mut files) = daemon.receive();
    let mut mode = String::new();
    files.remove(0).read_to_string(&mut mode).unwrap();
    match mode.as_str() {
        "store a wrong layer" => {
            daemon.layer(&id(b"good")).write_all(b"evil").unwrap();
            daemon.stored(&id(b"good"));
            daemon.send(&encode(&Request::Done));
        }
        "store a layer that was not asked for" => {
            daemon.layer(&id(b"good")).write_all(b"good").unwrap();
            daemon.stored(&id(b"never asked for"));
            daemon.send(&encode(&Request::Done));
        }
        "store a right layer and fail" => {
            daemon.partial();
            daemon.layer(&id(b"good")).write_all(b"good").unwrap();
            daemon.stored(&id(b"good"));
            let failure = Error::new(Kind::RegistryBusy, "too many requests");
            daemon.send(&encode(&Request::Failed((&failure).into())));
        }
        "store a wrong layer and fail" => {
            daemon.partial();
            daemon.layer(&id(b"good")).write_all(b"evil").unwrap();
            daemon.stored(&id(b"good"));
            let failure = Error::new(Kind::RegistryBusy, "too many requests");
            daemon.send(&encode(&Request::Failed((&failure).into())));
        }
        "store a right layer and wait" => {
            daemon.layer(&id(b"good")).write_all(b"good").unwrap();
            daemon.stored(&id(b"good"));
            // The daemon reads the messages in this order.
            let found = Found {
                digest: id(b"image"),
                name: None,
            };
            daemon.send(&encode(&Request::Found(found)));
            drop(daemon.receive());
            drop(daemon.receive());
        }
        "leave a partial download" | "leave a wrong partial download" => {
            daemon.partial();
            let kind = match mode.as_str() {
                "leave a partial download" => Kind::RegistryUnreachable,
                _ => Kind::InvalidImage,
            };
            let failure = Error::new(kind, "it is so");
            daemon.send(&encode(&Request::Failed((&failure).into())));
        }
        "change a stored layer" => {
            let mut file = daemon.layer(&id(b"good"));
            file.write_all(b"good").unwrap();
            daemon.stored(&id(b"good"));
            daemon.send(&encode(&Request::Done));
            loop {
                let _ = file.write_all(b"and more");
            }
        }
        "ask for many files" => loop {
            daemon.send(&encode(&Request::File));
            drop(daemon.receive());
        },
        "send a strange message" => daemon.send(b"{\"no such\":1}"),
        "be silent" => drop(daemon.receive()),
        _ => {}
    }
    ExitCode::SUCCESS
}

fn id(content: &[u8]) -> String {
    format!("sha256:{}", hex::encode(&Sha256::digest(content)))
}

struct Ignore;

impl Observer for Ignore {
    fn found(&mut self, _: Found) -> Result<bool> {
        Ok(true)
    }
    fn progress(&mut self, _: Progress) {}
}

struct Stage {
    _dir: tempfile::TempDir,
    layers: Layers,
    cancel: Cancel,
}

impl Stage {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        Self {
            layers: Layers::open(dir.path(), u64::MAX).unwrap(),
            _dir: dir,
            cancel: Cancel::try_new().unwrap(),
        }
    }

    fn run(&self, mode: &str) -> Result<Option<Vec<u8>>> {
        self.run_with(mode, &mut Ignore)
    }

    fn run_with(&self, mode: &str, observer: &mut dyn Observer) -> Result<Option<Vec<u8>>> {
        let image = tempfile::tempfile().unwrap();
        let mut session = Session {
            layers: &self.layers,
            uid: 7,
            owner: None,
            job: mode.as_bytes(),
            stream: None,
            image: &image,
        };
        session.run(NAME, &self.cancel, observer)
    }

    fn has(&self, content: &[u8]) -> bool {
        self.layers.get(&id(content)).unwrap().is_some()
    }

    /// Returns the number of partial downloads.
    fn partials(&self) -> usize {
        let dir = std::fs::read_dir(self.layers.partials.dir());
        dir.unwrap().count()
    }
}

#[test]
fn layer_with_wrong_content_is_not_cached() {
    let stage = Stage::new();
    stage.run("store a wrong layer").unwrap();
    assert!(!stage.has(b"good") && !stage.has(b"evil"));
}

#[test]
fn layer_that_was_not_asked_for_ends_pull() {
    let stage = Stage::new();
    let e = stage
        .run("store a layer that was not asked for")
        .unwrap_err();
    assert!(e.to_string().contains("did not ask for"), "{e}");
}

#[test]
fn complete_layers_of_failed_pull_are_cached() {
    let stage = Stage::new();
    let e = stage.run("store a right layer and fail").unwrap_err();
    assert_eq!(e.kind(), Kind::RegistryBusy);
    assert!(stage.has(b"good"));
}

#[test]
fn partial_download_of_cached_layer_is_removed() {
    let stage = Stage::new();
    stage.run("store a wrong layer and fail").unwrap_err();
    assert_eq!((stage.has(b"good"), stage.partials()), (false, 1));
    stage.run("store a right layer and fail").unwrap_err();
    assert_eq!((stage.has(b"good"), stage.partials()), (true, 0));
}

/// Cancels the pull as soon as the image is known.
struct CancelWhenFound<'a>(&'a Cancel);

impl Observer for CancelWhenFound<'_> {
    fn found(&mut self, _: Found) -> Result<bool> {
        self.0.cancel(CancelCause::Requested);
        Ok(true)
    }
    fn progress(&mut self, _: Progress) {}
}

#[test]
fn complete_layers_of_cancelled_pull_are_cached() {
    let stage = Stage::new();
    let mut observer = CancelWhenFound(&stage.cancel);
    let e = stage
        .run_with("store a right layer and wait", &mut observer)
        .unwrap_err();
    assert_eq!(e.kind(), Kind::Cancelled);
    assert!(stage.has(b"good"));
}

#[test]
fn partial_download_is_kept_unless_it_may_be_wrong() {
    let stage = Stage::new();
    let kept = || {
        let file = stage.layers.partials.get(7, &id(b"blob")).unwrap().unwrap();
        std::io::read_to_string(file).unwrap()
    };
    stage.run("leave a partial download").unwrap_err();
    assert_eq!(kept(), "bl");
    stage.run("leave a wrong partial download").unwrap_err();
    assert_eq!(kept(), "");
}

#[test]
fn layer_that_changes_after_its_end_is_not_cached_changed() {
    let stage = Stage::new();
    stage.run("change a stored layer").unwrap();
    if let Some(mut cached) = stage.layers.get(&id(b"good")).unwrap() {
        assert_eq!(std::io::read_to_string(&mut cached).unwrap(), "good");
    }
}

#[test]
fn misbehaving_helper_fails_its_own_pull() {
    let stage = Stage::new();
    for (mode, says) in [
        ("ask for many files", "asked for too many files"),
        ("send a strange message", "sent a malformed message"),
        ("die", "died"),
    ] {
        let e = stage.run(mode).unwrap_err();
        assert!(e.to_string().contains(says), "{mode}: {e}");
    }
}

#[test]
fn silent_helper_is_ended_by_cancel() {
    let stage = Stage::new();
    stage.cancel.cancel(CancelCause::Requested);
    assert_eq!(stage.run("be silent").unwrap_err().kind(), Kind::Cancelled);
}
