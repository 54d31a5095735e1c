//! Checks that the generated tables in the documentation match the code. `FCD_UPDATE_DOCS=1`
//! rewrites them.

use std::path::Path;

fn check(file: &str, name: &str, table: &str) {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join(file);
    let text = std::fs::read_to_string(&path).unwrap();
    let (begin, end) = (
        format!("<!-- {name}: begin -->\n"),
        format!("<!-- {name}: end -->"),
    );
    let from = text
        .find(&begin)
        .unwrap_or_else(|| panic!("no {begin:?} in {file}"))
        + begin.len();
    let to = from
        + text[from..]
            .find(&end)
            .unwrap_or_else(|| panic!("no {end:?} in {file}"));
    if text[from..to] == *table {
        return;
    }
    if std::env::var_os("FCD_UPDATE_DOCS").is_some() {
        std::fs::write(&path, format!("{}{table}{}", &text[..from], &text[to..])).unwrap();
        return;
    }
    panic!(
        "the table {name} in {file} differs from the code: run FCD_UPDATE_DOCS=1 cargo test --features fakes --test it docs"
    );
}

#[test]
fn generated_tables_match_code() {
    // The checks run one after the other because two of the tables are in the same file.
    check(
        "ARCHITECTURE.md",
        "locks",
        &format!(
            "{}\n",
            fcd::testing::locks::rank::markdown_table().trim_end()
        ),
    );
    check(
        "ARCHITECTURE.md",
        "transitions",
        &format!("{}\n", fcd::testing::daemon::transitions_table().trim_end()),
    );
    check("src/docs/exit-statuses.md", "kinds", &kinds());
    check(
        "src/docs/protocol.md",
        "methods",
        &fcd::testing::api::table::markdown_table(),
    );
}

fn kinds() -> String {
    let mut out =
        String::from("| kind | code | fcctl's exit status | retryable |\n|---|---|---|---|\n");
    for kind in fcd::testing::error::Kind::ALL {
        let code = serde_json::to_value(kind.code()).unwrap();
        let retryable = if kind.retryable() { "yes" } else { "no" };
        let (name, status) = (kind.name(), kind.code().exit_status());
        out += &format!(
            "| `{name}` | `{}` | {status} | {retryable} |\n",
            code.as_str().unwrap()
        );
    }
    out
}

/// Returns the public members of a struct, from its source.
fn members(source: &str, name: &str) -> Vec<String> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("src/api")
        .join(source);
    let text = std::fs::read_to_string(path).unwrap();
    let body = text
        .split_once(&format!("pub struct {name} {{\n"))
        .unwrap()
        .1;
    let lines = body.lines().take_while(|line| *line != "}");
    let named = lines.filter_map(|line| line.trim().strip_prefix("pub ")?.split_once(':'));
    let mut names: Vec<_> = named.map(|(name, _)| name.to_owned()).collect();
    names.sort();
    names
}

/// Returns the words in backticks in the first column of the table behind `title`.
fn documented(text: &str, title: &str) -> Vec<String> {
    let after = text
        .split_once(title)
        .unwrap_or_else(|| panic!("no {title:?}"))
        .1;
    let rows = after.lines().skip_while(|line| !line.starts_with("|---"));
    let rows = rows.skip(1).take_while(|line| line.starts_with('|'));
    let cells = rows.map(|row| row.split('|').nth(1).unwrap());
    let mut names: Vec<_> = cells
        .flat_map(|cell| cell.split('`').skip(1).step_by(2))
        .map(str::to_owned)
        .collect();
    names.sort();
    names
}

#[test]
fn members_of_json_output_are_documented() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("src/docs/lists.md");
    let text = std::fs::read_to_string(path).unwrap();
    for (title, source, name) in [
        ("the members of a VM:", "vm.rs", "Vm"),
        ("the members of an image:", "image.rs", "Image"),
        ("the members of a snapshot:", "snapshot.rs", "Snapshot"),
        ("the members of a kernel:", "kernel.rs", "Kernel"),
        ("the members of an operation:", "op.rs", "Op"),
        ("the members of a kind of space,", "daemon.rs", "SpaceUse"),
        ("the members of a check of", "daemon.rs", "Check"),
    ] {
        assert_eq!(documented(&text, title), members(source, name), "{title}");
    }
}
