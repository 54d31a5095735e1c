//! The images of the tests' guests. Each image is built once and cached.

use super::{Host, base};
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

/// Returns the directory of a minimal image named `default`, which is built once for all test
/// binaries of this source.
pub fn image() -> &'static Path {
    static IMAGE: OnceLock<PathBuf> = OnceLock::new();
    IMAGE.get_or_init(|| cached_image("default", &[]))
}

/// Returns the directory of the guest runtime that was built with the default image.
pub fn runtimes() -> PathBuf {
    let state = image().parent().and_then(Path::parent).unwrap();
    state.join("runtimes")
}

/// Returns the directory of the image that `fcctl image build` makes, under the name `full`.
pub fn full_image() -> PathBuf {
    cached("full", &[])
}

/// Returns the directory of a minimal image with these packages, and builds the image if it does
/// not exist.
pub fn cached_image(name: &str, packages: &[&str]) -> PathBuf {
    let include = packages.join(",");
    let mut args = vec!["--minimal"];
    if !packages.is_empty() {
        args.extend(["--include", &include]);
    }
    cached(name, &args)
}

fn cached(name: &str, args: &[&str]) -> PathBuf {
    let cache = base().join("image-cache");
    fs::create_dir_all(&cache).unwrap();
    fs::set_permissions(&cache, fs::Permissions::from_mode(0o755)).unwrap();
    let lock = fs::File::create(cache.join(format!("lock-{name}"))).unwrap();
    lock.lock().unwrap();
    let state = cache.join(image_key(args));
    let image = state.join("images").join(name);
    if !image.join("image.json").exists() {
        let _ = fs::remove_dir_all(&state);
        let mut host = Host {
            disk: None,
            dir: tempfile::tempdir_in(base()).unwrap(),
            fcd: None,
            config: String::new(),
            unread_log: None,
            log_filter: "info",
        };
        host.launch(&state);
        let built = host.fcctl(&[&["image", "build", name], args].concat());
        assert!(
            built.status.success(),
            "image build: {}",
            String::from_utf8_lossy(&built.stderr)
        );
        host.stop_daemon();
    }
    image
}

/// Returns a name that depends on the image's recipe, so that another recipe builds another image.
fn image_key(args: &[&str]) -> String {
    use std::hash::{Hash, Hasher};
    let mut hasher = std::hash::DefaultHasher::new();
    args.hash(&mut hasher);
    let mut dirs = vec![Path::new(env!("CARGO_MANIFEST_DIR")).join("src/image")];
    let mut files = Vec::new();
    while let Some(dir) = dirs.pop() {
        for entry in fs::read_dir(dir).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                dirs.push(path)
            } else {
                files.push(path)
            }
        }
    }
    files.sort();
    for file in files {
        file.hash(&mut hasher);
        fs::read(&file).unwrap().hash(&mut hasher);
    }
    format!("{:016x}", hasher.finish())
}

/// Returns a directory that `make` fills, once for all test binaries. Another recipe makes another
/// directory.
pub fn cached_dir(name: &str, recipe: &str, make: impl FnOnce(&Path)) -> PathBuf {
    use std::hash::{Hash, Hasher};
    let cache = base().join("image-cache");
    fs::create_dir_all(&cache).unwrap();
    let lock = fs::File::create(cache.join(format!("lock-{name}"))).unwrap();
    lock.lock().unwrap();
    let mut hasher = std::hash::DefaultHasher::new();
    recipe.hash(&mut hasher);
    let dir = cache.join(format!("{name}-{:016x}", hasher.finish()));
    if !dir.exists() {
        let draft = tempfile::tempdir_in(&cache).unwrap();
        make(draft.path());
        fs::rename(draft.keep(), &dir).unwrap();
    }
    dir
}
