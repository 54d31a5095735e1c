use super::*;

/// Measures latency. Run it with `cargo test --release --features fakes --lib server::tests::bench
/// -- --ignored --nocapture`.
#[test]
#[ignore = "measures; run it by hand in a release build"]
fn latency_with_idle_connections() {
    limits::raise_descriptor_limit();
    let f = fixture_with(limits::roomy());
    let mut c = f.client();
    let mut measure = |what: &str| {
        let line = b"{\"jsonrpc\":\"2.0\",\"id\":1,\"method\":\"echo\"}\n";
        let mut answer = String::new();
        let mut times: Vec<_> = (0..20_000)
            .map(|_| {
                let begun = Instant::now();
                c.send(line);
                answer.clear();
                c.reader.read_line(&mut answer).unwrap();
                begun.elapsed()
            })
            .collect();
        times.sort();
        println!(
            "{what}: p50 {:?}, p99 {:?}, most {:?}",
            times[10_000], times[19_800], times[19_999]
        );
    };
    measure("alone");
    let idle: Vec<_> = (0..1000).map(|_| f.client()).collect();
    measure("with 1000 idle connections");
    drop(idle);
    let begun = Instant::now();
    (0..2000).for_each(|_| f.client().check_alive());
    println!("connect, call, close: {:?} each", begun.elapsed() / 2000);
}
