use super::super::budget::Budget;
use super::super::layer::index;
use super::super::test_tar::{Item, device, dir, file, hardlink, item, symlink, tar};
use super::*;
use crate::error::{Error, Kind};

/// Returns one line per path of the merged tree. The mode of an entry shows which layer it is from.
fn merged(layers: &[Vec<Item>]) -> Result<Vec<String>> {
    merged_within(100_000, layers)
}

fn merged_within(steps_max: u64, layers: &[Vec<Item>]) -> Result<Vec<String>> {
    let budget = Budget::new(1 << 30);
    let read = layers
        .iter()
        .map(|items| index(std::io::BufReader::new(&tar(items)[..]), &budget));
    let indexes: Vec<LayerIndex> = read.collect::<Result<_>>()?;
    let indexes: Vec<&LayerIndex> = indexes.iter().collect();
    let tree = merge_within(steps_max, &indexes, &Cancel::try_new().unwrap())?;
    tree.check();
    let mut lines = Vec::new();
    let mut work = vec![(String::new(), ROOT)];
    while let Some((path, id)) = work.pop() {
        let line = match &tree.node(id).content {
            Content::Directory { children, named_by } => {
                for (name, child) in children.iter().rev() {
                    work.push((format!("{path}/{name}"), *child));
                }
                let by = named_by.map_or("unnamed".to_owned(), |by| (by.layer + 1).to_string());
                format!("{path}/ {by}")
            }
            Content::Object(object) => {
                let entry = tree.entry(*object);
                let from = &entry.path;
                match &entry.kind {
                    EntryKind::Symlink { target } => format!("{path} -> {target}"),
                    _ if path[1..] == **from => format!("{path} {}", object.layer + 1),
                    _ => format!("{path} {} as {from}", object.layer + 1),
                }
            }
        };
        lines.push(line);
    }
    Ok(lines)
}

#[track_caller]
fn check(layers: &[Vec<Item>], expected: &str) {
    let expected: Vec<&str> = expected
        .lines()
        .map(str::trim)
        .filter(|l| !l.is_empty())
        .collect();
    assert_eq!(merged(layers).unwrap(), expected);
}

#[track_caller]
fn refused(layers: &[Vec<Item>], message: &str) -> Error {
    let error = merged(layers).unwrap_err();
    assert_eq!(error.kind(), Kind::InvalidImage);
    assert!(error.to_string().contains(message), "{error}");
    error
}

fn wh(path: &str) -> Item {
    file(path, "")
}

#[test]
fn layers_are_laid_over_each_other() {
    check(&[], "/ unnamed");
    check(
        &[
            vec![
                dir("./"),
                dir("d"),
                file("d/a", "1"),
                file("d/b", "1"),
                file("x/y/z", ""),
            ],
            vec![dir("d"), file("d/b", "2"), file("d/c", "2")],
        ],
        "/ 1
         /d/ 2
         /d/a 1
         /d/b 2
         /d/c 2
         /x/ unnamed
         /x/y/ unnamed
         /x/y/z 1",
    );
}

#[test]
fn files_and_directories_replace_each_other() {
    let lower = vec![
        dir("a"),
        file("a/x", ""),
        file("b", ""),
        symlink("c", "a"),
        dir("d"),
        file("d/x", ""),
    ];
    let upper = vec![
        file("a", ""),
        dir("b"),
        file("b/x", ""),
        dir("c"),
        file("c/y", ""),
        symlink("d", "b"),
    ];
    check(
        &[lower, upper],
        "/ unnamed
         /a 2
         /b/ 2
         /b/x 2
         /c/ 2
         /c/y 2
         /d -> b",
    );
}

#[test]
fn last_of_duplicate_entries_wins() {
    let twice = vec![
        file("a", "1"),
        dir("b"),
        symlink("a", "x"),
        file("b", ""),
        dir("b"),
        file("b/c", ""),
    ];
    check(
        &[twice],
        "/ unnamed
         /a -> x
         /b/ 1
         /b/c 1",
    );
}

#[test]
fn whiteouts_remove_what_lower_layers_have() {
    let lower = || {
        vec![
            file("a", ""),
            dir("d"),
            file("d/x", ""),
            file("d/y", ""),
            dir("e"),
            file("e/z", ""),
        ]
    };
    check(
        &[
            lower(),
            vec![
                wh(".wh.a"),
                wh("d/.wh.x"),
                wh(".wh.e"),
                wh(".wh.none"),
                wh("no/.wh.x"),
            ],
        ],
        "/ unnamed
         /d/ 1
         /d/y 1",
    );
    // Only the name of a whiteout matters, not its kind.
    let odd = vec![
        dir(".wh.a"),
        symlink("d/.wh.x", "y"),
        device(b'3', ".wh.e", 0, 0),
    ];
    check(
        &[lower(), odd],
        "/ unnamed
         /d/ 1
         /d/y 1",
    );
}

#[test]
fn whiteouts_spare_their_own_layer() {
    let lower = || {
        vec![
            dir("d"),
            file("d/x", "1"),
            file("d/y", "1"),
            dir("d/s"),
            file("d/s/t", "1"),
        ]
    };
    for upper in [
        vec![
            wh("d/.wh.x"),
            file("d/x", "2"),
            wh("d/s/.wh..wh..opq"),
            file("d/s/u", "2"),
        ],
        vec![
            file("d/x", "2"),
            wh("d/.wh.x"),
            file("d/s/u", "2"),
            wh("d/s/.wh..wh..opq"),
        ],
        vec![
            file("d/x", "2"),
            wh("d/.wh.x"),
            file("d/s/u", "2"),
            wh("d/.wh.s"),
        ],
    ] {
        check(
            &[lower(), upper],
            "/ unnamed
             /d/ 1
             /d/s/ 1
             /d/s/u 2
             /d/x 2
             /d/y 1",
        );
    }
}

#[test]
fn opaque_directory_hides_everything_below() {
    let lower = || {
        vec![
            dir("d"),
            file("d/x", ""),
            dir("d/e"),
            file("d/e/y", ""),
            file("f", ""),
        ]
    };
    check(
        &[
            lower(),
            vec![dir("d"), wh("d/.wh..wh..opq"), file("d/n", "")],
        ],
        "/ unnamed
         /d/ 2
         /d/n 2
         /f 1",
    );
    check(
        &[lower(), vec![file("d/e/n", ""), wh("d/.wh..wh..opq")]],
        "/ unnamed
         /d/ 1
         /d/e/ 1
         /d/e/n 2
         /f 1",
    );
    check(&[lower(), vec![wh(".wh..wh..opq")]], "/ unnamed");
}

#[test]
fn hard_links_share_one_object_across_layers() {
    let lower = vec![
        file("a", "1"),
        hardlink("b", "a"),
        file("dir/c", "1"),
        symlink("s", "a"),
        hardlink("t", "s"),
    ];
    let upper = vec![
        hardlink("d", "b"),
        file("a", "2"),
        wh("dir/.wh.c"),
        hardlink("e", "a"),
    ];
    check(
        &[lower, upper],
        "/ unnamed
         /a 2
         /b 1 as a
         /d 1 as a
         /dir/ unnamed
         /e 2 as a
         /s -> a
         /t -> a",
    );
    check(
        &[vec![file("a", ""), hardlink("a", "a")]],
        "/ unnamed\n/a 1",
    );
}

#[test]
fn wrong_hard_links_are_refused() {
    refused(&[vec![hardlink("a", "none")]], "does not exist");
    refused(&[vec![hardlink("a", "no/ne")]], "does not exist");
    refused(&[vec![hardlink("a", "b"), file("b", "")]], "does not exist");
    refused(&[vec![dir("d"), hardlink("a", "d")]], "to a directory");
    refused(&[vec![hardlink("a", "")]], "does not exist");
    refused(
        &[vec![file("f", ""), hardlink("a", "f/x")]],
        "not a directory",
    );
}

#[test]
fn links_in_a_path_are_followed_inside_the_tree() {
    let lower = vec![
        dir("usr"),
        dir("usr/lib"),
        symlink("lib", "usr/lib"),
        file("usr/lib/old", ""),
        dir("etc"),
    ];
    let upper = vec![
        file("lib/new", ""),
        wh("lib/.wh.old"),
        hardlink("x", "lib/new"),
    ];
    check(
        &[lower, upper],
        "/ unnamed
         /etc/ 1
         /lib -> usr/lib
         /usr/ 1
         /usr/lib/ 1
         /usr/lib/new 2 as lib/new
         /x 2 as lib/new",
    );
    let escapes = vec![
        dir("etc"),
        symlink("up", "../../.."),
        symlink("abs", "/etc"),
        symlink("s/far", "../../../../etc/./"),
        file("up/a", ""),
        file("abs/b", ""),
        file("s/far/c", ""),
    ];
    check(
        &[escapes],
        "/ unnamed
         /a 1 as up/a
         /abs -> /etc
         /etc/ 1
         /etc/b 1 as abs/b
         /etc/c 1 as s/far/c
         /s/ unnamed
         /s/far -> ../../../../etc/./
         /up -> ../../..",
    );
}

#[test]
fn link_to_nowhere_makes_its_target() {
    check(
        &[vec![
            symlink("l", "no/where"),
            file("l/a", ""),
            symlink("m", "gone/../b"),
            file("m/c", ""),
        ]],
        "/ unnamed
         /b/ unnamed
         /b/c 1 as m/c
         /l -> no/where
         /m -> gone/../b
         /no/ unnamed
         /no/where/ unnamed
         /no/where/a 1 as l/a",
    );
}

#[test]
fn link_to_name_of_whiteout_is_refused() {
    for target in [".wh.", "/a/.wh.b", "../.wh..wh..opq/c"] {
        let layer = vec![symlink("link", target), file("link/x", "")];
        refused(&[layer], "the name of a whiteout");
    }
}

#[test]
fn loops_of_links_are_kept_but_lead_nowhere() {
    let loops = || {
        vec![
            symlink("a", "b"),
            symlink("b", "a"),
            symlink("self", "self"),
        ]
    };
    check(
        &[loops()],
        "/ unnamed
         /a -> b
         /b -> a
         /self -> self",
    );
    for path in ["a/x", "self/x", "self/.wh.x"] {
        let mut items = loops();
        items.push(file(path, ""));
        refused(&[items], "too many links");
    }
}

#[test]
fn hostile_whiteouts_and_roots_are_refused() {
    for path in [".wh.", ".wh..", ".wh...", "d/.wh.", "d/.wh..", "d/.wh..."] {
        refused(&[vec![dir("d"), wh(path)]], "does not name a file");
    }
    refused(&[vec![file(".wh.d/x", "")]], "name of a whiteout");
    refused(&[vec![symlink("./", "/etc")]], "must be a directory");
    refused(&[vec![wh("/")]], "must be a directory");
    refused(&[vec![file("f", ""), file("f/x", "")]], "not a directory");
    // AUFS stored its own files in images.
    check(
        &[vec![
            dir(".wh..wh.plnk"),
            file(".wh..wh.plnk/1.2", ""),
            wh(".wh..wh.aufs"),
        ]],
        "/ unnamed",
    );
}

#[test]
fn errors_name_layer_and_entry() {
    let error = refused(&[vec![dir("d")], vec![hardlink("d/a\n", "x")]], "layer 2");
    assert_eq!(
        error.to_string(),
        r#"layer 2: entry "d/a\n": it is a hard link to "x", which does not exist"#
    );
}

#[test]
fn work_is_limited_in_depth_and_steps() {
    let deep = symlink("deep", &"d/".repeat(DEPTH_MAX));
    refused(&[vec![deep, file("deep/e/f", "")]], "nested");
    // Each path walks through forty links of a thousand directories.
    let mut items =
        vec![item(b'2', "l0").with(|item| item.link = "d/../".repeat(800).into_bytes())];
    for n in 1..LINKS_MAX {
        let target = format!("l{}/{}", n - 1, "d/../".repeat(800));
        items.push(symlink(&format!("l{n}"), &target));
    }
    items.push(dir("d"));
    let last = LINKS_MAX - 1;
    items.extend((0..3).map(|n| file(&format!("l{last}/{n}"), "")));
    refused(&[items], "too many steps");
}
