//! `rpc`: calls any method of the API, for scripts and debugging.

use super::context::Context;
use crate::client::{CALL_DEADLINE, Result};
use crate::error::Error;
use serde_json::value::RawValue;

#[derive(clap::Args, Debug)]
pub(super) struct Args {
    /// Method, such as vm.show
    method: String,
    /// Parameters as JSON, such as '{"vm":"web"}'
    #[arg(value_name = "JSON", default_value = "{}")]
    params: String,
    /// Wait for the operation: progress on stderr, the result when it has ended
    #[arg(short, long)]
    more: bool,
}

/// Prints the result as the daemon sent it, followed by a newline.
pub(super) fn run(ctx: &mut Context, args: Args) -> Result<u8> {
    let Context {
        connector,
        printer,
        stdio,
        ..
    } = ctx;
    let params = RawValue::from_string(args.params).map_err(|e| {
        Error::invalid("the parameters are not JSON")
            .with_source(e)
            .hint(r#"quote them: '{"vm":"web"}'"#)
    })?;
    let mut client = connector.connect(printer)?;
    let result = if args.more {
        let mut notes = super::output::Out::new(
            stdio
                .stderr
                .try_clone()
                .map_err(|e| Error::io("duplicate stderr", e))?,
        );
        client.call_raw_more(&args.method, &params, &mut |note| {
            let text = serde_json::to_string(&note)
                .map_err(|e| Error::internal("write JSON").with_source(e))?;
            let _ = notes.line(&text);
            Ok(())
        })?
    } else {
        client.call_raw(&args.method, &params, CALL_DEADLINE)?
    };
    printer.line(result.get())?;
    Ok(0)
}
