//! Measures the conversion of a layout into a bootable ext4 file. `scripts/bench image` runs it.

use super::archive::{Archive, Wanted};
use super::errors::bad;
use super::files::TestFiles;
use super::flatten::{Flatten, flatten};
use super::limits::UNPACKED_BYTES_MAX;
use super::manifest::{Blobs, Descriptor, Image, find_in_layout, resolve};
use super::platform::Platform;
use super::test_image::{Compression, TestImage};
use super::test_tar::{Item, dir, file};
use super::test_tree::run;
use crate::error::Result;
use crate::locks::Cancel;
use crate::sched::Instant;
use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::time::Duration;

const DISK_BYTES: u64 = 8 << 30;

/// The blobs of a layout on disk, in place of a registry's.
struct Layout<'a>(&'a Path);

impl Blobs for Layout<'_> {
    fn open(&self, blob: &Descriptor) -> Result<Box<dyn Read + Send + '_>> {
        let file = File::open(self.0.join("blobs/sha256").join(blob.digest.hex()));
        Ok(Box::new(
            file.map_err(|e| bad("open a blob").with_source(e))?,
        ))
    }
}

impl Layout<'_> {
    fn image(&self) -> Image {
        let index = std::fs::read(self.0.join("index.json")).unwrap();
        let root = find_in_layout(&index, None, &Platform::default()).unwrap();
        resolve(&root.blob, &Platform::default(), self).unwrap()
    }
}

/// Returns bytes that gzip compresses to about half, like programs.
fn content(seed: u64, len: usize) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut bytes = Vec::with_capacity(len + 16);
    while bytes.len() < len {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        bytes.extend_from_slice(&state.to_le_bytes());
        bytes.extend_from_slice(b"the same");
    }
    bytes.truncate(len);
    bytes
}

/// Makes layers that have this many files together. Each layer replaces some files of the one
/// below.
fn layers(count: usize, files: usize) -> Vec<Vec<Item>> {
    let per_layer = files / count;
    let layer = |number: usize| {
        let mut items = vec![dir("usr"), dir("usr/lib")];
        for n in 0..per_layer {
            let id = number * per_layer + n - usize::from(number > 0) * (per_layer / 10);
            if n % 50 == 0 {
                items.push(dir(&format!("usr/lib/package-{}", id / 50)));
            }
            let len = 200 + id * 7919 % 24_000;
            let path = format!("usr/lib/package-{}/file-{id}.so", id / 50);
            let bytes = content((number * files + id) as u64, len);
            items.push(file(&path, "").with(|item| item.content = bytes));
        }
        items
    };
    (0..count).map(layer).collect()
}

/// Returns the memory of this process, in KiB: now (`VmRSS`) or at its peak (`VmHWM`).
fn memory_kib(field: &str) -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find(|line| line.starts_with(field)).unwrap();
    line.split_whitespace().nth(1).unwrap().parse().unwrap()
}

struct Measured {
    time: Duration,
    peak_mib: u64,
}

fn measured(what: impl FnOnce()) -> Measured {
    // Resets the peak (proc(5)).
    std::fs::write("/proc/self/clear_refs", "5").unwrap();
    let (before, begun) = (memory_kib("VmRSS"), Instant::now());
    what();
    Measured {
        time: begun.elapsed(),
        peak_mib: memory_kib("VmHWM").saturating_sub(before) >> 10,
    }
}

struct Place {
    dir: tempfile::TempDir,
    cancel: Cancel,
}

impl Place {
    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// Measures a pull. Then removes its output, outside of the measured time.
    fn measured(&self, pull: impl FnOnce()) -> Measured {
        let found = measured(pull);
        std::fs::remove_file(self.path("ours.ext4")).unwrap();
        found
    }

    fn store(&self, name: &str) -> TestFiles {
        std::fs::create_dir(self.path(name)).unwrap();
        TestFiles(self.path(name))
    }

    fn flatten(&self, image: &Image, blobs: &dyn Blobs, store: &TestFiles) {
        let out = File::create_new(self.path("ours.ext4")).unwrap();
        let request = Flatten {
            files: store,
            out: &out,
            disk_bytes: DISK_BYTES,
            unpacked_bytes_max: UNPACKED_BYTES_MAX,
            progress: &|_| {},
            cancel: &self.cancel,
        };
        flatten(image, blobs, &request).unwrap();
    }

    /// Pulls from blobs that can be opened one by one, as with a registry.
    fn pull(&self, layout: &Path, store: &TestFiles) {
        let layout = Layout(layout);
        self.flatten(&layout.image(), &layout, store);
    }

    /// Pulls the tar of a layout from a pipe, as a pull of `oci:DIR` does.
    fn pull_stream(&self, layout: &Path, store: &TestFiles) {
        let (reader, writer) = std::io::pipe().unwrap();
        std::thread::scope(|scope| {
            scope.spawn(move || {
                let mut tar = tar::Builder::new(std::io::BufWriter::with_capacity(1 << 20, writer));
                tar.append_dir_all(".", layout).unwrap();
                tar.into_inner().unwrap();
            });
            let archive = Archive::spool(
                reader,
                tempfile::tempfile().unwrap(),
                UNPACKED_BYTES_MAX,
                &|_| {},
                &self.cancel,
            );
            let mut archive = archive.unwrap();
            let image = archive
                .image(&Wanted::default(), &|_| {}, &self.cancel)
                .unwrap();
            self.flatten(&image, &archive, store);
        });
    }

    /// Does the same with the tools of the distribution.
    fn tools(&self, layout: &Path) {
        let at = |name: &str| self.path(name).to_str().unwrap().to_owned();
        let from = format!("oci:{}:test", layout.display());
        let copy = at("copy");
        run(
            "skopeo",
            &["copy", "-q", &from, &format!("oci:{copy}:test")],
        );
        run(
            "umoci",
            &[
                "raw",
                "unpack",
                "--image",
                &format!("{copy}:test"),
                &at("tree"),
            ],
        );
        run(
            "mke2fs",
            &[
                "-q",
                "-t",
                "ext4",
                "-d",
                &at("tree"),
                &at("theirs.ext4"),
                "8G",
            ],
        );
        for dir in ["copy", "tree"] {
            std::fs::remove_dir_all(self.path(dir)).unwrap();
        }
        std::fs::remove_file(self.path("theirs.ext4")).unwrap();
    }
}

fn median(mut times: Vec<f64>) -> f64 {
    times.sort_by(f64::total_cmp);
    times[times.len() / 2]
}

fn row(count: usize, files: usize, rounds: usize) {
    let place = Place {
        dir: tempfile::tempdir().unwrap(),
        cancel: Cancel::try_new().unwrap(),
    };
    let mut all = layers(count, files);
    TestImage::new(&all, Compression::Gzip).write_layout(&place.path("first"), "test");
    all.pop();
    all.push(vec![file("another", "top layer")]);
    TestImage::new(&all, Compression::Gzip).write_layout(&place.path("second"), "test");
    drop(all);
    let (mut ours, mut streams, mut seconds, mut theirs) = (vec![], vec![], vec![], vec![]);
    let mut peak_mib = 0;
    let has_tools = std::env::var_os("FCD_BENCH_TOOLS").is_none_or(|tools| tools != "0");
    for round in 0..rounds {
        if has_tools {
            let begun = Instant::now();
            place.tools(&place.path("first"));
            theirs.push(begun.elapsed().as_secs_f64());
        }
        let store = place.store(&format!("layers-{round}"));
        let first = place.measured(|| place.pull(&place.path("first"), &store));
        ours.push(first.time.as_secs_f64());
        peak_mib = peak_mib.max(first.peak_mib);
        let second = place.measured(|| place.pull(&place.path("second"), &store));
        seconds.push(second.time.as_secs_f64());
        let store = place.store(&format!("stream-{round}"));
        let stream = place.measured(|| place.pull_stream(&place.path("first"), &store));
        streams.push(stream.time.as_secs_f64());
        for name in ["layers", "stream"] {
            std::fs::remove_dir_all(place.path(&format!("{name}-{round}"))).unwrap();
        }
    }
    let (ours, stream, second) = (median(ours), median(streams), median(seconds));
    let tools = if has_tools {
        let theirs = median(theirs);
        let (of_layout, of_pipe) = (ours / theirs, stream / theirs);
        format!("tools {theirs:.2} s (fcd {of_layout:.2} of it, from a pipe {of_pipe:.2})")
    } else {
        "tools not measured".to_owned()
    };
    println!(
        "{count:>3} layers, {files:>6} files: {tools}, fcd {ours:.2} s, from a pipe {stream:.2} s, \
         second image {second:.2} s ({:.2} of the first), peak {peak_mib} MiB",
        second / ours,
    );
}

#[test]
#[ignore = "a measurement: scripts/bench image"]
fn bench() {
    let rounds = std::env::var("FCD_BENCH_ROUNDS").ok();
    let rounds = rounds.map_or(3, |rounds| rounds.parse().unwrap());
    for count in [3, 40] {
        for files in [9_000, 50_000] {
            row(count, files, rounds);
        }
    }
    // The peak of memory must not depend on the size of a file.
    let place = Place {
        dir: tempfile::tempdir().unwrap(),
        cancel: Cancel::try_new().unwrap(),
    };
    for mib in [16, 256] {
        let large = file("large", "").with(|item| item.content = content(mib as u64, mib << 20));
        let layout = place.path(&format!("layout-{mib}"));
        TestImage::new(&[vec![large]], Compression::Gzip).write_layout(&layout, "test");
        let store = place.store(&format!("layers-{mib}"));
        let found = place.measured(|| place.pull(&layout, &store));
        println!("one file of {mib} MiB: peak {} MiB", found.peak_mib);
    }
    // The memory that one entry costs determines the limit of entries.
    for count in [20_000, 200_000] {
        let files = (0..count).map(|n| file(&format!("dir-{}/a-file-{n}", n / 100), ""));
        let layout = place.path(&format!("layout-{count}"));
        TestImage::new(&[files.collect()], Compression::Gzip).write_layout(&layout, "test");
        let store = place.store(&format!("layers-{count}"));
        let found = place.measured(|| place.pull(&layout, &store));
        let seconds = found.time.as_secs_f64();
        println!(
            "{count} empty files: peak {} MiB, {seconds:.2} s",
            found.peak_mib
        );
    }
}
