//! `image list`.

use super::context::Context;
use super::format::{Field, ListArgs, Value, field};
use super::output::{self, MatchedText, age, size};
use crate::api::image::{Image, ImageList, short_digest};
use crate::api::page::ListRequest;
use crate::client::Result;
use crate::error::Error;
use crate::host::text::quoted;

#[derive(clap::Args, Debug)]
pub(super) struct Args {
    /// List only images with this name; * stands for any characters
    #[arg(value_name = "NAME")]
    name: Option<String>,
    /// The same as NAME, in docker's form: reference=NAME
    #[arg(short, long, value_name = "reference=NAME", value_parser = parse_reference, conflicts_with = "name")]
    filter: Option<String>,
    /// Print only names, one per line
    #[arg(short, long)]
    quiet: bool,
    #[command(flatten)]
    list: ListArgs,
}

fn parse_reference(text: &str) -> Result<String, Error> {
    let name = text.strip_prefix("reference=").filter(|n| !n.is_empty());
    name.map(str::to_owned).ok_or_else(|| {
        Error::invalid(format!("{} is not a filter", quoted(text)))
            .hint("reference=NAME, where * stands for any characters")
    })
}

/// The fields of an image, for templates and sorting.
pub(super) const FIELDS: &[Field<Image>] = &[
    field("Name", "NAME", |i| Value::text(&i.name)),
    field("Repository", "REPOSITORY", |i| {
        Value::text(i.name.parts().repository)
    }),
    field("Tag", "TAG", |i| Value::optional(i.name.parts().tag)),
    field("Digest", "DIGEST", |i| Value::optional(i.digest.as_ref())),
    field("OS", "OS", |i| Value::text(&i.os)),
    field("Kernel", "KERNEL", |i| Value::text(&i.kernel)),
    field("Disk", "DISK", |i| Value::Bytes(i.disk_bytes)),
    field("Size", "ON HOST", |i| Value::Bytes(i.allocated_bytes)),
    field("Built", "BUILT", |i| Value::Time(i.built_at)),
    field("VMs", "VMS", |i| Value::Number(i.vms)),
    field("Owner", "OWNER", |i| Value::optional(i.owner_uid)),
    field("Source", "SOURCE", |i| Value::optional(i.source.as_ref())),
];

pub(super) fn run(ctx: &mut Context, args: Args) -> Result<u8> {
    let Context {
        connector,
        printer,
        now_s,
        ..
    } = ctx;
    let now_s = *now_s;
    let template = args.list.parse(FIELDS)?;
    let mut images = connector
        .connect(printer)?
        .list::<ImageList>(ListRequest::default())?;
    if let Some(name) = args
        .name
        .or(args.filter)
        .map(|name| MatchedText::new(&name))
    {
        let is_match = |image: &Image| {
            name.matches(image.name.as_str()) || name.matches(image.name.parts().repository)
        };
        images.retain(is_match);
    }
    args.list.sort(&mut images, FIELDS)?;
    if args.quiet {
        let names: Vec<_> = images.iter().map(|image| image.name.as_str()).collect();
        if printer.json {
            printer.document(&names)?;
        } else {
            printer.text(&names.iter().map(|n| format!("{n}\n")).collect::<String>())?;
        }
        return Ok(0);
    }
    if printer.json {
        printer.document(&images)?;
        return Ok(0);
    }
    if let Some(template) = template {
        printer.text(&template.render(FIELDS, &images, now_s))?;
        return Ok(0);
    }
    let row = |image: &Image| {
        vec![
            image.name.to_string(),
            image.digest.as_deref().map_or("-", short_digest).to_owned(),
            image.os.clone(),
            image.kernel.clone(),
            size(image.disk_bytes),
            on_host(image),
            age(now_s, image.built_at),
            image.vms.to_string(),
        ]
    };
    let rows: Vec<_> = images.iter().map(row).collect();
    printer.text(&output::table(
        &[
            "NAME", "DIGEST", "OS", "KERNEL", "DISK", "ON HOST", "BUILT", "VMS",
        ],
        &rows,
    ))?;
    Ok(0)
}

/// Returns the space that an image uses on this host or, for a registered image, the state of its
/// file.
pub(super) fn on_host(image: &Image) -> String {
    match &image.file {
        None => size(image.allocated_bytes),
        Some(file) if file.changed.is_some() => "changed".to_owned(),
        Some(_) => "in place".to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::check;
    use crate::client::fake::Fake;
    use expect_test::expect;
    use serde_json::json;

    #[test]
    fn list_of_images_has_templates_and_filters() {
        let fake = Fake::start(|r| {
            let image = |name: &str, vms: u64, bytes: u64| {
                json!({ "name": name, "disk_bytes": bytes, "allocated_bytes": bytes / 2,
                    "kernel": "Linux", "os": "Debian", "built_at": 1_800_000_000, "vms": vms,
                    "owner_uid": null })
            };
            let (app, gcc) = (image("app", 2, 1 << 30), image("gcc:13", 0, 5 << 30));
            r.result(json!({ "images": [app, gcc] }));
        });
        check(
            &fake,
            &[
                "images",
                "--format",
                "{{.Repository}} {{.Tag}}",
                "--sort",
                "-size",
            ],
            expect![[r#"
                > image.list {}
                gcc 13
                app 
                status 0
            "#]],
        );
        check(
            &fake,
            &["images", "gcc"],
            expect![[r#"
            > image.list {}
            NAME    DIGEST  OS      KERNEL  DISK   ON HOST  BUILT   VMS
            gcc:13  -       Debian  Linux   5 GiB  2.5 GiB  0s ago  0
            status 0
        "#]],
        );
        check(
            &fake,
            &["image", "list", "-q", "--filter", "reference=a*"],
            expect![[r#"
                > image.list {}
                app
                status 0
            "#]],
        );
        check(
            &fake,
            &["images", "--filter", "dangling=true"],
            expect![[r#"
                ! fcctl: invalid value 'dangling=true' for '--filter <reference=NAME>': "dangling=true" is not a filter
                ! hint: reference=NAME, where * stands for any characters
                status 2
            "#]],
        );
        check(
            &fake,
            &["images", "--format", "{{.ID}}"],
            expect![[r#"
            ! fcctl: --format has an unknown field: ".ID"
            ! hint: fields: .Name .Repository .Tag .Digest .OS .Kernel .Disk .Size .Built .VMs .Owner .Source
            status 2
        "#]],
        );
    }
}
