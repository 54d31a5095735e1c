//! Reports the progress of a pull to the daemon, from several threads.

use super::link::Link;
use super::protocol::Progress;
use crate::api::op::{PARTS_MAX, Part, PartState, most_relevant};
use crate::image::oci::{Digest, Layer};
use crate::sched::Instant;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::time::Duration;

/// How often progress is reported at most.
const REPORT_EVERY: Duration = Duration::from_millis(200);
/// The number of digits of a digest that docker shows.
const SHORT_DIGITS: usize = 12;

/// The stages of a pull.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Stage {
    Find,
    /// The caller has sent no byte of the archive yet.
    Await,
    Read,
    Verify,
    Fetch,
    Write,
}

impl Stage {
    const ALL: [Self; 6] = [
        Self::Find,
        Self::Await,
        Self::Read,
        Self::Verify,
        Self::Fetch,
        Self::Write,
    ];

    fn text(self) -> &'static str {
        match self {
            Self::Find => "find the image",
            Self::Await => "wait for the archive",
            Self::Read => "read the archive",
            Self::Verify => "verify the archive",
            Self::Fetch => "fetch the layers",
            Self::Write => "write the file system",
        }
    }
}

pub(super) struct Reporter<'a> {
    link: &'a Link,
    begun: Instant,
    /// The index of the stage in [`Stage::ALL`].
    stage: AtomicUsize,
    done: AtomicU64,
    /// The number of bytes in this stage, or 0 if it is not known.
    total: AtomicU64,
    /// The layers, once they are known.
    layers: OnceLock<Vec<LayerProgress>>,
    /// When progress was reported last, in milliseconds after `begun`.
    reported_ms: AtomicU64,
}

struct LayerProgress {
    name: String,
    /// The size of the blob.
    total: u64,
    /// The index of the state in [`STATES`].
    state: AtomicUsize,
    done: AtomicU64,
}

const STATES: [PartState; 4] = [
    PartState::Waiting,
    PartState::Downloading,
    PartState::Cached,
    PartState::Done,
];

impl LayerProgress {
    fn new(layer: &Layer) -> Self {
        Self {
            name: short(layer.blob.digest),
            total: layer.blob.size,
            state: AtomicUsize::new(PartState::Waiting as usize),
            done: AtomicU64::new(0),
        }
    }

    /// Sets the state. Returns true if it has changed.
    fn set_state(&self, state: PartState) -> bool {
        self.state.swap(state as usize, Ordering::Relaxed) != state as usize
    }

    fn part(&self) -> Part {
        Part {
            name: self.name.clone(),
            state: STATES[self.state.load(Ordering::Relaxed)],
            done: self.done.load(Ordering::Relaxed).min(self.total),
            total: self.total,
        }
    }
}

fn add_saturating(to: &AtomicU64, bytes: u64) {
    let order = Ordering::Relaxed;
    // The closure always returns a value, so this cannot fail.
    let _ = to.fetch_update(order, order, |sum| Some(sum.saturating_add(bytes)));
}

/// Shortens a digest to the digits that docker shows.
fn short(digest: Digest) -> String {
    let digest = digest.to_string();
    let digits = digest.split_once(':').map_or("", |(_, digits)| digits);
    digits.chars().take(SHORT_DIGITS).collect()
}

impl<'a> Reporter<'a> {
    pub(super) fn new(link: &'a Link) -> Self {
        Self {
            link,
            begun: Instant::now(),
            stage: AtomicUsize::new(0),
            done: AtomicU64::new(0),
            total: AtomicU64::new(0),
            layers: OnceLock::new(),
            reported_ms: AtomicU64::new(0),
        }
    }

    /// Begins a stage in which `total` bytes will be moved, if that is known.
    pub(super) fn stage(&self, stage: Stage, total: Option<u64>) {
        self.stage.store(stage as usize, Ordering::Relaxed);
        self.total.store(total.unwrap_or(0), Ordering::Relaxed);
        self.done.store(0, Ordering::Relaxed);
        self.report();
    }

    /// Begins the stage in which the layers are fetched.
    pub(super) fn begin_layers(&self, layers: &[Layer]) {
        // The sizes come from the manifest, which may be hostile, so the sum must not overflow.
        let sizes = layers.iter().map(|layer| layer.blob.size);
        let total = sizes.fold(0, u64::saturating_add);
        let layers = layers.iter().map(LayerProgress::new).collect();
        // A pull has one image, so the layers are set only once.
        let _ = self.layers.set(layers);
        self.stage(Stage::Fetch, Some(total));
    }

    pub(super) fn layer_is_cached(&self, layer: usize) {
        if let Some(layer) = self.layer(layer) {
            layer.set_state(PartState::Cached);
            layer.done.store(layer.total, Ordering::Relaxed);
            self.add(layer.total);
        }
    }

    pub(super) fn layer_advances(&self, layer: usize, bytes: u64) {
        let mut begins = false;
        if let Some(layer) = self.layer(layer) {
            begins = layer.set_state(PartState::Downloading);
            add_saturating(&layer.done, bytes);
        }
        self.add(bytes);
        // Report this now, because the next bytes may take long.
        if begins {
            self.report();
        }
    }

    pub(super) fn layer_is_done(&self, layer: usize) {
        if let Some(layer) = self.layer(layer) {
            layer.set_state(PartState::Done);
            self.report();
        }
    }

    fn layer(&self, layer: usize) -> Option<&LayerProgress> {
        self.layers.get()?.get(layer)
    }

    pub(super) fn add(&self, bytes: u64) {
        add_saturating(&self.done, bytes);
        let now_ms = self.begun.elapsed().as_millis() as u64;
        let last_ms = self.reported_ms.load(Ordering::Relaxed);
        let is_due = now_ms.saturating_sub(last_ms) >= REPORT_EVERY.as_millis() as u64;
        // Only one of several threads reports.
        let order = Ordering::Relaxed;
        if is_due
            && (self.reported_ms)
                .compare_exchange(last_ms, now_ms, order, order)
                .is_ok()
        {
            self.report();
        }
    }

    /// Reports the progress, even if nothing has changed, because the daemon ends a silent helper.
    pub(super) fn report(&self) {
        let total = self.total.load(Ordering::Relaxed);
        let stage = Stage::ALL[self.stage.load(Ordering::Relaxed)];
        let layers = self.layers.get().filter(|_| stage == Stage::Fetch);
        let parts = layers.into_iter().flatten().map(LayerProgress::part);
        self.link.progress(Progress {
            stage: stage.text().to_owned(),
            done: self.done.load(Ordering::Relaxed),
            total: (total > 0).then_some(total),
            parts: most_relevant(parts.collect(), PARTS_MAX),
            parts_total: layers.map(|layers| layers.len() as u64),
        });
    }
}

#[cfg(test)]
mod tests {
    use super::super::protocol::Request;
    use super::*;
    use crate::image::oci::Descriptor;
    use crossbeam_channel::unbounded;

    fn layer(n: u8, size: u64) -> Layer {
        let digest: Digest = format!("sha256:{}", format!("{n:02x}").repeat(32))
            .parse()
            .unwrap();
        Layer {
            blob: Descriptor {
                media_type: String::new(),
                digest,
                size,
            },
            diff_id: digest,
        }
    }

    /// Returns what is reported at the end of `work`.
    fn reported(layers: u8, work: impl FnOnce(&Reporter<'_>)) -> Progress {
        let layers: Vec<Layer> = (0..layers).map(|n| layer(n, 100)).collect();
        reported_of(&layers, work)
    }

    fn reported_of(layers: &[Layer], work: impl FnOnce(&Reporter<'_>)) -> Progress {
        let (asking, asked) = unbounded();
        let link = Link::new(asking);
        let answering = std::thread::scope(|scope| {
            let reports = scope.spawn(move || {
                let mut last = None;
                for (request, to) in asked {
                    if let Request::Progress(progress) = request {
                        last = Some(progress);
                    }
                    let _ = to.send(Ok(super::super::link::Answer::None));
                }
                last
            });
            let reporter = Reporter::new(&link);
            reporter.begin_layers(layers);
            work(&reporter);
            reporter.report();
            drop(link);
            reports.join().unwrap()
        });
        answering.unwrap()
    }

    #[test]
    fn each_layer_has_its_own_progress() {
        let progress = reported(4, |reporter| {
            reporter.layer_is_cached(0);
            reporter.layer_advances(1, 30);
            reporter.layer_advances(2, 100);
            reporter.layer_is_done(2);
        });
        assert_eq!((progress.done, progress.total), (230, Some(400)));
        let parts: Vec<_> = progress.parts.iter().map(|p| (p.state, p.done)).collect();
        assert_eq!(
            parts,
            [
                (PartState::Cached, 100),
                (PartState::Downloading, 30),
                (PartState::Done, 100),
                (PartState::Waiting, 0)
            ]
        );
        assert_eq!(progress.parts[1].name, "010101010101");
    }

    #[test]
    fn report_of_many_layers_is_bounded() {
        let progress = reported(127, |reporter| {
            (0..40).for_each(|n| reporter.layer_is_cached(n));
            reporter.layer_advances(120, 1);
        });
        assert_eq!(progress.parts.len(), PARTS_MAX);
        assert_eq!(progress.parts_total, Some(127));
        assert!(
            progress
                .parts
                .iter()
                .any(|p| p.state == PartState::Downloading)
        );
    }

    #[test]
    fn sizes_beyond_all_numbers_do_not_end_the_pull() {
        let layers = [layer(0, u64::MAX), layer(1, u64::MAX)];
        let progress = reported_of(&layers, |reporter| {
            reporter.layer_is_cached(0);
            reporter.layer_is_cached(1);
        });
        assert_eq!((progress.done, progress.total), (u64::MAX, Some(u64::MAX)));
    }

    #[test]
    fn later_stage_has_no_layers() {
        let progress = reported(2, |reporter| reporter.stage(Stage::Write, Some(5)));
        assert_eq!(progress.parts, []);
        assert_eq!(progress.parts_total, None);
    }
}
