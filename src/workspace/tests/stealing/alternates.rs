//! Tests with objects that a repository borrows from another repository.

use super::super::*;
use super::{Heist, SECRET};
use crate::error::Kind;
use std::os::unix::fs::symlink;

#[test]
fn alternate_of_another_repository_is_refused() {
    let check = |text: &dyn Fn(&Heist) -> String| {
        let heist = Heist::new();
        heist.site.write(
            ".git/refs/heads/trunk",
            heist.private.git(&["rev-parse", "HEAD"]),
        );
        heist
            .site
            .write(".git/objects/info/alternates", text(&heist));
        heist.refused(&heist.private(".git/objects").display().to_string());
        let hint = heist.run().unwrap().hint_text().unwrap().to_owned();
        assert!(hint.contains("--allow-alternate"), "{hint}");
    };
    let objects = |heist: &Heist| heist.private(".git/objects").display().to_string();
    check(&|h| format!("{}\n", objects(h)));
    check(&|h| objects(h));
    check(&|h| format!("# a comment\n/not/there\n\n{}//.//\n", objects(h)));
    check(&|h| format!("..{}{}\n", "/..".repeat(30), objects(h)));
    check(&|h| format!("\"{}\"\n", objects(h)));
    check(&|h| format!("\"{}\"\n", objects(h).replacen('t', "\\164", 1)));
    // git accepts another byte after a quoted path.
    check(&|h| format!("\"/not/there\"x{}\n", objects(h)));
    check(&|h| format!("\"{}\"x\n", objects(h)));
}

#[test]
fn nested_alternate_of_another_repository_is_refused() {
    // A store inside the tree belongs to the tree. Its own alternate belongs to another repository.
    let heist = Heist::new();
    heist.site.write(
        "store/info/alternates",
        format!("{}\n", heist.private(".git/objects").display()),
    );
    heist
        .site
        .write(".git/objects/info/alternates", "../../store\n");
    heist.site.write(
        ".git/refs/heads/trunk",
        heist.private.git(&["rev-parse", "HEAD"]),
    );
    heist.refused(&heist.private(".git/objects").display().to_string());
    // Here the directory or the file itself is a link.
    let heist = Heist::new();
    heist.link(".git/objects/info", heist.private(".git/objects/info"));
    heist.refused("objects/info");
    let heist = Heist::new();
    heist.site.write(
        "list",
        format!("{}\n", heist.private(".git/objects").display()),
    );
    heist.link(".git/objects/info/alternates", heist.site.path("list"));
    heist.refused(&heist.private(".git/objects").display().to_string());
}

#[test]
fn http_alternates_are_not_followed() {
    let heist = Heist::new();
    let text = format!("{}\n", heist.private(".git/objects").display());
    heist.site.write(".git/objects/info/http-alternates", text);
    assert!(heist.run().is_none());
}

#[test]
fn pack_named_by_multi_pack_index_outside_is_not_used() {
    // A multi-pack index names packs by file name, and git does not check the names.
    let heist = Heist::new();
    heist.private.git(&["repack", "-adq"]);
    heist.private.git(&["multi-pack-index", "write"]);
    let packs = heist.private(".git/objects/pack");
    let midx = std::fs::read(packs.join("multi-pack-index")).unwrap();
    assert!(!midx.is_empty());
    let at = midx.windows(5).position(|w| w == b"pack-").unwrap();
    let name = String::from_utf8(midx[at..at + 49].to_vec()).unwrap();
    assert!(name.ends_with(".idx"), "{name}");
    // The new name is longer, so `forge_midx` also changes the offsets.
    let short = heist.site.dir.path().join("host/p");
    symlink(&packs, &short).unwrap();
    let way = format!("../../../../p/{name}");
    let grow = (way.len() - name.len()).next_multiple_of(4);
    let forged = forge_midx(&midx, at, &name, &way, grow);
    heist
        .site
        .write(".git/objects/pack/multi-pack-index", forged);
    heist.site.write(
        ".git/refs/heads/trunk",
        heist.private.git(&["rev-parse", "HEAD"]),
    );
    // The test proves something only if git itself is deceived.
    assert!(
        heist
            .site
            .git(&["show", "HEAD:secret"])
            .contains(SECRET.trim())
    );
    assert!(heist.run().is_some());
}

/// Returns a copy of the multi-pack index in which a longer name replaces the only name in the PNAM
/// chunk. git does not verify the file's checksum.
fn forge_midx(midx: &[u8], at: usize, name: &str, way: &str, grow: usize) -> Vec<u8> {
    let end = at + name.len() + 1;
    let padded = end.next_multiple_of(4).max(end);
    let mut new = way.as_bytes().to_vec();
    let old_size = (padded - at).max(end - at);
    new.resize(old_size + grow, 0);
    let mut out = [&midx[..at], &new, &midx[at + old_size..]].concat();
    // The table of chunks contains an ID and an offset for each chunk.
    let chunks = midx[6] as usize;
    for i in 0..=chunks {
        let entry = 12 + 12 * i + 4;
        let offset = u64::from_be_bytes(out[entry..entry + 8].try_into().unwrap());
        if offset > at as u64 {
            out[entry..entry + 8].copy_from_slice(&(offset + grow as u64).to_be_bytes());
        }
    }
    out
}

/// Replaces the hostile tree with a repository whose objects are all in the private repository.
/// Returns the directory of the objects.
fn shared_clone(heist: &Heist) -> PathBuf {
    let main = heist.private.host();
    let site = &heist.site;
    std::fs::remove_dir_all(site.host()).unwrap();
    let into = site.host();
    let args = [
        "clone",
        "-q",
        "--shared",
        main.to_str().unwrap(),
        into.to_str().unwrap(),
    ];
    git(&main, &site.dir.path().join("home"), &args);
    main.join(".git/objects")
}

#[test]
fn shared_clone_is_sent_when_its_alternate_is_allowed() {
    let heist = Heist::bare();
    let objects = shared_clone(&heist);
    let e = heist.run().expect("refused");
    let hint = e.hint_text().unwrap();
    assert!(
        hint.contains(&format!("--allow-alternate {}", objects.display())),
        "{hint}"
    );
    assert!(
        e.to_string().contains(".git/objects/info/alternates"),
        "{e}"
    );
    // It is enough to allow the store, its repository or a link to the store.
    let link = heist.site.dir.path().join("link");
    symlink(heist.private.host(), &link).unwrap();
    for allowed in [objects.clone(), heist.private.host(), link] {
        let site = Site::plain();
        let options = Options {
            allow_alternates: vec![allowed],
            ..heist.site.options(History::Full)
        };
        let mut plan = Plan::inspect(&heist.site.host(), &options, &cancel()).unwrap();
        site.prepare_with(&mut plan, false).unwrap();
        assert_eq!(site.git_guest(&["show", "HEAD:secret"]), SECRET);
        assert_eq!(site.git_guest(&["status", "--porcelain"]), "");
        site.git_guest(&["fsck"]);
    }
    // Allowing another directory does not help. Allowing a directory that does not exist is an
    // error.
    let check = |allowed: PathBuf, kind: Kind| {
        let options = Options {
            allow_alternates: vec![allowed],
            ..heist.site.options(History::Full)
        };
        assert_eq!(heist.run_with(&options).unwrap().kind(), kind);
    };
    check(heist.private.path("dir"), Kind::InvalidTree);
    check(heist.private.path("no-such"), Kind::PathNotFound);
}

#[test]
fn alternate_of_an_allowed_store_must_be_allowed_too() {
    let heist = Heist::bare();
    let objects = shared_clone(&heist);
    let third = Site::committed();
    let list = objects.join("info/alternates");
    std::fs::write(&list, format!("{}\n", third.path(".git/objects").display())).unwrap();
    let options = |allowed: &[&Path]| Options {
        allow_alternates: allowed.iter().map(|p| p.to_path_buf()).collect(),
        ..heist.site.options(History::Full)
    };
    let e = Plan::inspect(&heist.site.host(), &options(&[&objects]), &cancel())
        .err()
        .unwrap();
    assert!(
        e.to_string().contains(&third.host().display().to_string()),
        "{e}"
    );
    Plan::inspect(
        &heist.site.host(),
        &options(&[&objects, &third.host()]),
        &cancel(),
    )
    .unwrap();
    // Allowing a path does not allow other paths.
    std::fs::remove_file(&list).unwrap();
    std::fs::remove_dir_all(objects.join("pack")).unwrap();
    symlink(third.path(".git/objects/pack"), objects.join("pack")).unwrap();
    let e = Plan::inspect(&heist.site.host(), &options(&[&objects]), &cancel())
        .err()
        .unwrap();
    assert!(e.to_string().contains("objects/pack"), "{e}");
}

#[test]
fn alternate_of_another_owner_is_refused_without_the_flag() {
    if !nix::unistd::geteuid().is_root() {
        eprintln!("not run: only root can make files of another owner");
        return;
    }
    let heist = Heist::bare();
    let objects = shared_clone(&heist);
    run(Command::new("chown")
        .args(["-R", "65534"])
        .arg(heist.private.host()));
    assert_eq!(heist.run().unwrap().kind(), Kind::InvalidTree);
    let options = Options {
        allow_alternates: vec![objects],
        ..heist.site.options(History::Full)
    };
    Plan::inspect(&heist.site.host(), &options, &cancel()).unwrap();
}
