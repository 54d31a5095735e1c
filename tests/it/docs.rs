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
