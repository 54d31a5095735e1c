use super::super::files::TestFiles;
use super::super::limits::UNPACKED_BYTES_MAX;
use super::super::manifest::{Blobs, Descriptor};
use super::super::test_image::{Compression, TestImage};
use super::super::test_tar::{Item, MTIME, device, dir, file, hardlink, item, symlink};
use super::super::test_tree::{Mounted, is_root, run, scan};
use super::*;
use crate::locks::CancelCause;
use std::io::Read;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicU64;

const DISK_BYTES: u64 = 64 << 20;

/// A cache and an output file.
struct Bench {
    dir: tempfile::TempDir,
    files: TestFiles,
    cancel: Cancel,
}

impl Bench {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let layers = dir.path().join("layers");
        std::fs::create_dir(&layers).unwrap();
        Self {
            dir,
            files: TestFiles(layers),
            cancel: Cancel::try_new().unwrap(),
        }
    }

    fn out(&self) -> PathBuf {
        self.dir.path().join("rootfs.ext4")
    }

    fn flatten_with(
        &self,
        image: &TestImage,
        disk_bytes: u64,
        progress: &(dyn Fn(Progress) + Sync),
    ) -> Result<Flattened> {
        let out = File::create(self.out()).unwrap();
        let request = Flatten {
            files: &self.files,
            out: &out,
            disk_bytes,
            unpacked_bytes_max: UNPACKED_BYTES_MAX,
            progress,
            cancel: &self.cancel,
        };
        flatten(&image.resolve(), image, &request)
    }

    fn flatten(&self, image: &TestImage) -> Result<Flattened> {
        self.flatten_with(image, DISK_BYTES, &|_| {})
    }

    /// Flattens an image whose uncompressed layers may have this many bytes.
    fn flatten_within(&self, image: &TestImage, unpacked_bytes_max: u64) -> Result<Flattened> {
        let out = File::create(self.out()).unwrap();
        self.flatten_into(&out, image, unpacked_bytes_max)
    }

    fn flatten_into(
        &self,
        out: &File,
        image: &TestImage,
        unpacked_bytes_max: u64,
    ) -> Result<Flattened> {
        let request = Flatten {
            files: &self.files,
            out,
            disk_bytes: DISK_BYTES,
            unpacked_bytes_max,
            progress: &|_| {},
            cancel: &self.cancel,
        };
        flatten(&image.resolve(), image, &request)
    }

    fn cached_files(&self) -> Vec<String> {
        let entries = std::fs::read_dir(self.dir.path().join("layers")).unwrap();
        let names = entries.map(|e| e.unwrap().file_name().into_string().unwrap());
        let mut names: Vec<String> = names.filter(|name| !name.ends_with(".new")).collect();
        names.sort();
        names
    }
}

fn check_file_system(path: &Path) {
    run("e2fsck", &["-fn", path.to_str().unwrap()]);
}

/// Compares fcd's file system with what umoci unpacks, entry by entry.
#[track_caller]
fn check(name: &str, layers: &[Vec<Item>]) {
    if !is_root() {
        return;
    }
    let begun = crate::host::time::now_s().cast_signed();
    let image = TestImage::new(layers, Compression::Gzip);
    let bench = Bench::new();
    let (layout, bundle) = (
        bench.dir.path().join("layout"),
        bench.dir.path().join("bundle"),
    );
    image.write_layout(&layout, "test");
    let layout = format!("{}:test", layout.display());
    run(
        "umoci",
        &["unpack", "--image", &layout, bundle.to_str().unwrap()],
    );
    bench.flatten(&image).unwrap();
    check_file_system(&bench.out());
    let mounted = Mounted::new(&bench.out());
    let mut ours = scan(mounted.0.path());
    ours.remove(Path::new(LOST_FOUND));
    let mut theirs = scan(&bundle.join("rootfs"));
    theirs.remove(Path::new(LOST_FOUND));
    for (path, found) in &ours {
        // umoci does not restore the times of directories that no layer names, and of directories
        // in which it added or removed something on its own. They keep the time of the unpacking,
        // and the root keeps 1970.
        if let Some(other) = theirs.get_mut(path)
            && other.mode & libc::S_IFMT == libc::S_IFDIR
            && (other.mtime[0] >= begun || found.mtime[0] == filesystem::FIXED_TIME_S)
        {
            assert!([MTIME, filesystem::FIXED_TIME_S].contains(&found.mtime[0]));
            other.mtime = found.mtime;
        }
    }
    for path in ours.keys().chain(theirs.keys()) {
        assert_eq!(ours.get(path), theirs.get(path), "{name}: {path:?}");
    }
}

fn wh(path: &str) -> Item {
    file(path, "")
}

#[test]
fn tree_of_plain_files_equals_umoci() {
    let large = "0123456789".repeat(30_000);
    check(
        "plain",
        &[vec![
            dir("./").mode(0o711).owner(3, 4),
            dir("a").mode(0o1777),
            file("a/empty", ""),
            file("a/large", &large).mode(0o600).owner(1000, 100),
            file("a/block", &"b".repeat(4096)),
            symlink("a/link", "../b/none"),
            symlink("a/long-link", &format!("/{}", "t".repeat(200))),
            file("implied/parents/f", "x"),
        ]],
    );
}

#[test]
fn tree_with_odd_attributes_equals_umoci() {
    check(
        "attributes",
        &[vec![
            file("setuid", "x").mode(0o4755).owner(1, 2),
            file("setgid", "x").mode(0o2755).owner(1, 2),
            file("large-id", "x").owner(3_000_000_000, 4_294_967_294),
            file("before-1970", "x").mtime(-1_000_000),
            file("after-2038", "x").mtime(5_000_000_000),
            file("fraction", "x").pax("mtime", b"1600000000.123456789"),
            file("negative-fraction", "x").pax("mtime", b"-2.25"),
            file("zero", "x").mtime(0),
            dir("dir").mode(0o2750).mtime(7).owner(5, 6),
            symlink("link", "x").owner(7, 8).mtime(9),
        ]],
    );
}

#[test]
fn tree_with_extended_attributes_equals_umoci() {
    let acl = [
        &2_u32.to_le_bytes()[..],
        &[1, 0, 6, 0, 255, 255, 255, 255],
        &[2, 0, 7, 0, 0xe8, 3, 0, 0],
        &[4, 0, 4, 0, 255, 255, 255, 255],
        &[0x10, 0, 7, 0, 255, 255, 255, 255],
        &[0x20, 0, 4, 0, 255, 255, 255, 255],
    ]
    .concat();
    let capability = [
        1, 0, 0, 2, 0, 0x20, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0,
    ];
    check(
        "xattrs",
        &[vec![
            file("user", "x")
                .xattr("user.a", b"\0\xff=")
                .xattr("user.b", b""),
            file("capability", "x")
                .mode(0o755)
                .xattr("security.capability", &capability),
            file("many", "x")
                .xattr("user.large", &[7; 2000])
                .xattr("trusted.x", b"y"),
            dir("dir")
                .xattr("user.d", b"d")
                .xattr("system.posix_acl_default", &acl),
            file("acl", "x")
                .mode(0o674)
                .xattr("system.posix_acl_access", &acl),
        ]],
    );
}

#[test]
fn tree_with_whiteouts_equals_umoci() {
    let lower = || {
        vec![
            dir("d"),
            file("d/a", "1"),
            file("d/b", "1"),
            dir("d/s"),
            file("d/s/t", "1"),
            file("top", "1"),
            dir("gone"),
            file("gone/x", "1"),
        ]
    };
    for (name, upper) in [
        (
            "simple",
            vec![wh("d/.wh.a"), wh(".wh.top"), wh(".wh.gone"), wh(".wh.none")],
        ),
        (
            "before",
            vec![
                wh("d/.wh.a"),
                file("d/a", "2"),
                wh(".wh.gone"),
                dir("gone").mode(0o700),
            ],
        ),
        (
            "after",
            vec![
                file("d/a", "2"),
                wh("d/.wh.a"),
                file("d/s/u", "2"),
                wh("d/.wh.s"),
            ],
        ),
        (
            "opaque",
            vec![dir("d"), wh("d/.wh..wh..opq"), file("d/n", "2")],
        ),
        (
            "opaque last",
            vec![
                dir("d"),
                file("d/n", "2"),
                file("d/s/u", "2"),
                wh("d/.wh..wh..opq"),
            ],
        ),
        ("opaque root", vec![wh(".wh..wh..opq"), file("only", "2")]),
        (
            "odd kinds",
            vec![hardlink(".wh.top", "d/a"), symlink("d/.wh.b", "x")],
        ),
    ] {
        check(name, &[lower(), upper]);
    }
}

#[test]
fn tree_with_hard_links_equals_umoci() {
    check(
        "links",
        &[
            vec![
                file("a", "1"),
                hardlink("b", "a"),
                dir("d"),
                hardlink("d/c", "./b"),
                symlink("s", "a"),
                hardlink("t", "s"),
                device(b'3', "null", 1, 3),
                hardlink("null2", "null"),
            ],
            vec![file("a", "2"), hardlink("e", "d/c"), wh(".wh.b")],
            vec![hardlink("f", "e"), hardlink("g", "a"), file("d/c", "3")],
        ],
    );
}

#[test]
fn tree_with_devices_equals_umoci() {
    check(
        "devices",
        &[vec![
            dir("dev"),
            device(b'3', "dev/null", 1, 3).mode(0o666),
            device(b'4', "dev/sda", 8, 0).owner(0, 6),
            device(b'3', "dev/large", 254, 70_000),
            item(b'6', "dev/fifo").mode(0o600),
        ]],
    );
}

#[test]
fn tree_with_replaced_kinds_equals_umoci() {
    check(
        "replaced",
        &[
            vec![
                dir("a"),
                file("a/x", "1"),
                file("b", "1"),
                symlink("c", "a"),
                dir("d"),
                file("d/x", "1"),
            ],
            vec![
                file("a", "2"),
                dir("b"),
                file("b/x", "2"),
                dir("c"),
                file("c/y", "2"),
                symlink("d", "b"),
            ],
            vec![
                dir("a").mode(0o700),
                symlink("b", "c"),
                file("c", "3"),
                item(b'6', "d"),
            ],
        ],
    );
    check(
        "duplicates",
        &[vec![
            file("a", "1"),
            symlink("a", "x"),
            file("a", "3"),
            dir("b"),
            dir("b").mode(0o700),
        ]],
    );
}

#[test]
fn tree_through_links_equals_umoci() {
    let lower = vec![
        dir("usr"),
        dir("usr/lib"),
        file("usr/lib/old", "1"),
        file("usr/lib/kept", "1"),
        symlink("lib", "usr/lib"),
        symlink("abs", "/usr"),
        symlink("up", "../../.."),
        symlink("loop", "loop"),
        symlink("nowhere", "no/where"),
    ];
    let upper = vec![
        file("lib/new", "2"),
        wh("lib/.wh.old"),
        file("abs/bin/tool", "2"),
        file("up/etc/x", "2"),
        hardlink("h", "lib/kept"),
        file("nowhere/f", "2"),
    ];
    check("symlinks", &[lower, upper]);
}

#[test]
fn tree_with_long_names_equals_umoci() {
    let long = format!("{}/{}", "d".repeat(255), "f".repeat(255));
    let deep = format!("{}f", "deep/".repeat(60));
    let unicode = "räksmörgås/日本語/\u{1f600} with spaces\n";
    check(
        "names",
        &[vec![
            file(&long, "1"),
            file(&deep, "2"),
            file(unicode, "3"),
            file("pax", "4").pax("path", format!("{}/pax", "p".repeat(180)).as_bytes()),
            symlink("long", &"x/".repeat(1000)),
            hardlink(&"h".repeat(200), &long),
            file("-rf", "5"),
            file("...", "6"),
        ]],
    );
}

#[test]
fn large_directory_equals_umoci() {
    let mut items = vec![dir("many")];
    for n in 0..3000 {
        items.push(file(
            &format!("many/a-file-with-a-longer-name-{n}"),
            &n.to_string(),
        ));
    }
    check("large", &[items]);
}

#[test]
fn many_layers_equal_umoci() {
    let layer = |n: usize| {
        vec![
            file(&format!("only-{n}"), &n.to_string()),
            file("shared", &n.to_string()),
            file(&format!("d/{}", n % 7), &n.to_string()),
            wh(&format!(".wh.only-{}", n / 2)),
        ]
    };
    check("forty", &(0..40).map(layer).collect::<Vec<_>>());
}

#[test]
fn lost_and_found_of_image_may_be_empty() {
    let bench = Bench::new();
    let empty = TestImage::new(&[vec![dir("lost+found")]], Compression::Gzip);
    bench.flatten(&empty).unwrap();
    check_file_system(&bench.out());
    let full = TestImage::new(&[vec![file("lost+found/x", "")]], Compression::Gzip);
    assert_eq!(bench.flatten(&full).unwrap_err().kind(), Kind::Unsupported);
}

fn some_layers() -> Vec<Vec<Item>> {
    let content = "content ".repeat(20_000);
    vec![
        vec![
            dir("d"),
            file("d/a", &content),
            hardlink("d/b", "d/a"),
            symlink("l", "d"),
        ],
        vec![
            file("d/c", &content[..5000]).xattr("user.x", b"y"),
            wh("d/.wh.b"),
        ],
        vec![],
    ]
}

#[test]
fn same_image_gives_same_bytes_in_any_compression() {
    let mut all = Vec::new();
    for compression in [Compression::None, Compression::Gzip, Compression::Zstd] {
        let image = TestImage::new(&some_layers(), compression);
        let bench = Bench::new();
        for _ in 0..2 {
            let found = bench.flatten(&image).unwrap();
            assert_eq!((found.entries, found.layers.len()), (5, 3));
            check_file_system(&bench.out());
            let bytes = std::fs::read(bench.out()).unwrap();
            assert_eq!(bytes.len() as u64, DISK_BYTES);
            all.push(bytes);
        }
    }
    assert!(all[0] == all[1] && all[2] == all[3] && all[4] == all[5]);
}

#[test]
fn image_with_cached_layers_equals_its_cold_pull() {
    let odd = |n: usize| file(&format!("d/{n}"), &"odd sizes ".repeat(n * 977 % 40_000));
    let mut layers = some_layers();
    layers.push((0..40).map(odd).collect());
    let first = TestImage::new(&layers, Compression::Gzip);
    let whiteouts = vec![file("d/3", "new"), wh("d/.wh.4"), wh("d/.wh.a")];
    layers.push(whiteouts);
    let more = TestImage::new(&layers, Compression::Gzip);
    layers.swap(1, 4);
    layers.remove(0);
    let other = TestImage::new(&layers, Compression::Gzip);
    let (warm, cold) = (Bench::new(), [Bench::new(), Bench::new()]);
    warm.flatten(&first).unwrap();
    for (image, cold) in [&more, &other].into_iter().zip(&cold) {
        cold.flatten(image).unwrap();
        warm.flatten(image).unwrap();
        assert!(std::fs::read(warm.out()).unwrap() == std::fs::read(cold.out()).unwrap());
        check_file_system(&warm.out());
    }
    let opened = [&more, &other].map(|image| image.opened.load(Ordering::Relaxed));
    // The cold pull of `more` opens five blobs and its warm pull one. The third image has four
    // layers, all of them cached in `warm`.
    assert_eq!(opened, [5 + 1, 4]);
}

#[test]
fn output_takes_only_the_space_of_its_content() {
    let content = "x".repeat(100_001);
    let files = (0..20).map(|n| file(&format!("{n}"), &content));
    let image = TestImage::new(&[files.collect()], Compression::Gzip);
    let bench = Bench::new();
    let written = bench.flatten(&image).unwrap();
    let space = std::fs::metadata(bench.out()).unwrap().blocks() * 512;
    let metadata_max = 1 << 20;
    assert!(
        (written.bytes..written.bytes + metadata_max).contains(&space),
        "{space} bytes"
    );
}

#[test]
fn former_content_of_the_output_is_lost() {
    let image = TestImage::new(&some_layers(), Compression::None);
    let bench = Bench::new();
    bench.flatten(&image).unwrap();
    let wanted = std::fs::read(bench.out()).unwrap();
    std::fs::write(bench.out(), vec![0xaa; 2 * DISK_BYTES as usize]).unwrap();
    let out = File::options()
        .read(true)
        .write(true)
        .open(bench.out())
        .unwrap();
    bench
        .flatten_into(&out, &image, UNPACKED_BYTES_MAX)
        .unwrap();
    assert!(std::fs::read(bench.out()).unwrap() == wanted);
}

#[test]
fn cached_layers_are_not_read_again() {
    let bench = Bench::new();
    let image = TestImage::new(&some_layers(), Compression::Gzip);
    bench.flatten(&image).unwrap();
    assert_eq!(image.opened.load(Ordering::Relaxed), 3);
    bench.flatten(&image).unwrap();
    assert_eq!(image.opened.load(Ordering::Relaxed), 3);
    let mut layers = some_layers();
    layers.push(vec![file("more", "")]);
    layers.push(vec![file("d/c", "")]);
    layers.push(vec![file("more", "")]);
    let other = TestImage::new(&layers, Compression::Zstd);
    bench.flatten(&other).unwrap();
    assert_eq!(
        other.opened.load(Ordering::Relaxed),
        2,
        "only two blobs are opened, because the last layer equals the fourth"
    );
    assert_eq!(bench.cached_files().len(), 5);
}

#[test]
fn cached_layer_counts_once_against_the_limit() {
    let half = file("half", "").with(|item| item.content = vec![7; 1 << 20]);
    let image = TestImage::new(&[vec![half]], Compression::Gzip);
    let bench = Bench::new();
    for is_cached in [false, true] {
        bench
            .flatten_within(&image, (1 << 20) + (512 << 10))
            .unwrap_or_else(|e| panic!("cached: {is_cached}: {e}"));
    }
}

#[test]
fn lying_blobs_are_refused_and_leave_nothing() {
    let bytes_of = |image: &TestImage, at: usize| image.blobs[&image.layers[at].digest].clone();
    let changes: [fn(&mut Vec<u8>); 5] = [
        |blob| blob.truncate(blob.len() - 1),
        |blob| blob.push(0),
        |blob| blob.clear(),
        |blob| *blob = b"<html>not found</html>".to_vec(),
        |blob| {
            let last = blob.len() - 9;
            blob[last] ^= 1;
        },
    ];
    for compression in [Compression::None, Compression::Gzip, Compression::Zstd] {
        for change in changes {
            let mut image = TestImage::new(&some_layers()[..2], compression);
            let mut blob = bytes_of(&image, 1);
            change(&mut blob);
            let digest = image.layers[1].digest;
            image.blobs.insert(digest, blob);
            let bench = Bench::new();
            let error = bench.flatten(&image).unwrap_err();
            assert_eq!(error.kind(), Kind::InvalidImage, "{error}");
            assert!(error.to_string().starts_with("layer 2 (sha256:"), "{error}");
            assert!(!bench.files.path(Digest::of(&image.tars[1])).exists());
        }
    }
}

/// An image for which an earlier pull has kept wrong bytes.
struct Kept<'a>(&'a TestImage, Vec<u8>);

impl Blobs for Kept<'_> {
    fn open(&self, blob: &Descriptor) -> Result<Box<dyn Read + Send + '_>> {
        let is_layer = self
            .0
            .layers
            .iter()
            .any(|layer| layer.digest == blob.digest);
        if is_layer {
            return Ok(Box::new(self.1.as_slice()));
        }
        self.0.open(blob)
    }

    fn open_again(&self, blob: &Descriptor) -> Result<Option<Box<dyn Read + Send + '_>>> {
        self.0.open(blob).map(Some)
    }
}

#[test]
fn wrong_partial_download_is_fetched_once_more() {
    let image = TestImage::new(&some_layers(), Compression::Gzip);
    let bench = Bench::new();
    bench.flatten(&image).unwrap();
    let wanted = std::fs::read(bench.out()).unwrap();
    // The first bytes are the tar of another layer, and the second are not a tar at all.
    let other = TestImage::new(&[vec![dir("other")]], Compression::Gzip);
    let other = other.blobs[&other.layers[0].digest].clone();
    for kept in [other, b"neither gzip nor tar".repeat(99)] {
        let bench = Bench::new();
        let out = File::create(bench.out()).unwrap();
        let request = Flatten {
            files: &bench.files,
            out: &out,
            disk_bytes: DISK_BYTES,
            unpacked_bytes_max: UNPACKED_BYTES_MAX,
            progress: &|_| {},
            cancel: &bench.cancel,
        };
        flatten(&image.resolve(), &Kept(&image, kept), &request).unwrap();
        assert!(std::fs::read(bench.out()).unwrap() == wanted);
    }
}

#[test]
fn wrong_diff_id_is_refused() {
    let image = TestImage::new(&some_layers(), Compression::Gzip);
    let bench = Bench::new();
    let mut resolved = image.resolve();
    resolved.layers[1].diff_id = Digest::of(b"something else");
    let out = File::create(bench.out()).unwrap();
    let request = Flatten {
        files: &bench.files,
        out: &out,
        disk_bytes: DISK_BYTES,
        unpacked_bytes_max: UNPACKED_BYTES_MAX,
        progress: &|_| {},
        cancel: &bench.cancel,
    };
    let error = flatten(&resolved, &image, &request).unwrap_err();
    assert_eq!(error.kind(), Kind::InvalidImage);
    assert!(
        error
            .to_string()
            .contains("the uncompressed tar has another digest"),
        "{error}"
    );
}

#[test]
fn bombs_reach_the_limit_of_bytes() {
    let zeros = file("bomb", "").with(|item| item.content = vec![0; 8 << 20]);
    for compression in [Compression::Gzip, Compression::Zstd] {
        let image = TestImage::new(&[vec![zeros.clone()]], compression);
        assert!(image.layers[0].size < 128 << 10);
        let bench = Bench::new();
        let error = bench.flatten_within(&image, 1 << 20).unwrap_err();
        assert!(
            error.to_string().contains("more than 1048576 bytes"),
            "{error}"
        );
        assert_eq!(bench.cached_files(), [""; 0]);
    }
}

#[test]
fn disk_grows_with_the_files_of_the_image() {
    let large = file("large", "").with(|item| item.content = vec![1; 19 << 20]);
    let image = TestImage::new(&[vec![large]], Compression::Gzip);
    let bench = Bench::new();
    bench.flatten_with(&image, 20 << 20, &|_| {}).unwrap();
    let bytes = std::fs::metadata(bench.out()).unwrap().len();
    assert!(bytes > FREE_BYTES, "{bytes}");
    check_file_system(&bench.out());
}

#[test]
fn extended_attributes_that_do_not_fit_are_refused() {
    let large = file("a", "").xattr("user.large", &[1; 5000]);
    let image = TestImage::new(&[vec![large]], Compression::Gzip);
    assert!(Bench::new().flatten(&image).is_err());
}

#[test]
fn cancel_stops_at_every_step() {
    let image = TestImage::new(&some_layers(), Compression::Gzip);
    let steps = AtomicU64::new(0);
    let count = |_| {
        steps.fetch_add(1, Ordering::Relaxed);
    };
    Bench::new()
        .flatten_with(&image, DISK_BYTES, &count)
        .unwrap();
    for last in 1..steps.load(Ordering::Relaxed) {
        let bench = Bench::new();
        let steps = AtomicU64::new(0);
        let cancel = |_| {
            if steps.fetch_add(1, Ordering::Relaxed) + 1 == last {
                bench.cancel.cancel(CancelCause::Requested);
            }
        };
        match bench.flatten_with(&image, DISK_BYTES, &cancel) {
            Err(error) => assert_eq!(error.kind(), Kind::Cancelled, "step {last}: {error}"),
            // The pull succeeds if it had read the last content before the cancel.
            Ok(_) => assert!(bench.cancel.is_cancelled()),
        }
        assert!(
            bench
                .cached_files()
                .iter()
                .all(|name| !name.starts_with("tmp-"))
        );
    }
}
