//! What people see of a run: the plan, the report, the card, the answers, and what became of the rows.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod workplace;

use std::fs;
use std::path::Path;

use roxmltree::{Document, ParsingOptions};
use serde_json::{Value, json};
use workplace::{Workplace, failed, fixture, succeeded};

fn json_of(text: &str) -> Value {
    serde_json::from_str(text).unwrap()
}

fn lines_of(path: &Path) -> Vec<Value> {
    fs::read_to_string(path).unwrap().lines().map(json_of).collect()
}

/// The page as XML. Fails where it would need a network, or has a script.
fn parsed(html: &str) -> Document<'_> {
    let options = ParsingOptions {
        allow_dtd: true,
        ..ParsingOptions::default()
    };
    let document = Document::parse_with_options(html, options).unwrap();
    for node in document.descendants().filter(roxmltree::Node::is_element) {
        let name = node.tag_name().name();
        assert!(
            !["script", "link", "img", "iframe", "object"].contains(&name),
            "<{name}>"
        );
        for attribute in node.attributes() {
            let outside = attribute.value().contains("//") || attribute.name().starts_with("on");
            assert!(!outside, "<{name} {}={:?}>", attribute.name(), attribute.value());
        }
    }
    assert!(!html.contains("url(") && !html.contains("@import"));
    document
}

fn texts(document: &Document<'_>, tag: &str) -> Vec<String> {
    let nodes = document.descendants().filter(|node| node.has_tag_name(tag));
    nodes
        .map(|node| node.text().unwrap_or_default().to_owned())
        .collect()
}

#[test]
fn a_report_shows_curves_and_answers_and_nothing_breaks_out_of_it() {
    let place = Workplace::new();
    let mut rows: Vec<Value> = lines_of(&place.path("train.jsonl"));
    rows[0]["messages"][0]["content"] = json!("w9 </td><script>alert('&')</script>");
    place.write("train.jsonl", &rows);
    let more = [
        "--max-steps",
        "6",
        "--logging-steps",
        "2",
        "--eval-data",
        "train.jsonl",
        "--eval-steps",
        "3",
    ];
    succeeded(&place.sft("run", &more));

    let metrics = lines_of(&place.path("run/metrics.jsonl"));
    let of_kind = |kind: &str| metrics.iter().filter(|line| line["kind"] == kind).count();
    assert_eq!((of_kind("train"), of_kind("eval")), (3, 2));
    let samples = lines_of(&place.path("run/samples.jsonl"));
    let steps: Vec<_> = samples
        .iter()
        .map(|line| line["step"].as_u64().unwrap())
        .collect();
    assert_eq!(steps, [[3; 8], [6; 8]].concat());

    let html = fs::read_to_string(place.path("run/report.html")).unwrap();
    let document = parsed(&html);
    assert_eq!(texts(&document, "h1"), ["run"]);
    let captions = [
        "Loss, nats a token",
        "Learning rate",
        "Gradient norm, before clipping",
        "Speed, tokens/s",
    ];
    assert_eq!(texts(&document, "figcaption"), captions);
    let titles = texts(&document, "title");
    assert!(
        titles.iter().any(|title| title.starts_with("training, step 2: ")),
        "{titles:?}"
    );
    assert!(
        titles
            .iter()
            .any(|title| title.starts_with("evaluation, step 6: ")),
        "{titles:?}"
    );
    let cells = texts(&document, "td");
    assert!(
        cells.contains(&"w9 </td><script>alert('&')</script>".to_owned()),
        "{cells:?}"
    );
    assert!(cells.contains(&"done".to_owned()) && !html.contains("http-equiv"));
    assert!(cells.contains(&"per_device_train_batch_size".to_owned()));

    succeeded(&place.sft("run-2", &[&more[..], &["--r", "2"]].concat()));
    succeeded(&place.run(&["report", "run", "run-2", "-o", "both.html"]));
    let html = fs::read_to_string(place.path("both.html")).unwrap();
    let document = parsed(&html);
    assert_eq!(texts(&document, "h1"), ["2 runs"]);
    let spans = texts(&document, "span");
    assert!(spans.contains(&"run, training".to_owned()) && spans.contains(&"run-2, evaluation".to_owned()));
    // Only what differs stands in the first table of settings.
    let differ = document
        .descendants()
        .find(|node| node.text() == Some("That differ"))
        .unwrap();
    let table = differ.next_sibling_element().unwrap();
    let rows = table.descendants().filter(|node| node.has_tag_name("tr"));
    let names: Vec<_> = rows.filter_map(|row| row.first_element_child()?.text()).collect();
    assert_eq!(names, ["output_dir", "r"]);

    failed(
        1,
        "has no metrics.jsonl",
        &place.run(&["report", "model", "-o", "no.html"]),
    );
}

#[test]
fn a_plan_says_what_the_run_will_be() {
    let place = Workplace::new();
    let args = [
        "--model",
        "model",
        "--data",
        "train.jsonl",
        "--num-train-epochs",
        "2",
        "--r",
        "4",
    ];
    let batch = ["--per-device-train-batch-size", "3", "--json"];
    let plan = json_of(&succeeded(&place.run(&[&["plan"], &args[..], &batch].concat())));
    assert_eq!(
        fs::read_dir(place.dir.path()).unwrap().count(),
        2,
        "a plan writes nothing"
    );
    assert_eq!(
        (&plan["steps"], &plan["rows_seen"], &plan["data"]["used"]),
        (&json!(6), &json!(16), &json!(8))
    );
    let memory = plan["memory"].as_object().unwrap();
    let parts = memory
        .iter()
        .filter(|(key, _)| !["peak_bytes", "loading_bytes"].contains(&key.as_str()));
    let sum: u64 = parts.map(|(_, bytes)| bytes.as_u64().unwrap()).sum();
    assert_eq!(
        memory["peak_bytes"],
        sum.max(memory["loading_bytes"].as_u64().unwrap())
    );
    assert!(plan["measured"]["tokens_per_second"].as_f64().unwrap() > 0.0);

    let run = [&["sft", "-o", "run"], &args[..], &batch].concat();
    let summary = json_of(&succeeded(&place.run(&run)));
    assert_eq!(summary["trained_parameters"], plan["parameters"]["trained"]);
    assert_eq!(summary["tokens"], plan["tokens_seen"]);
    assert_eq!(summary["data_file"]["sha256"].as_str().unwrap().len(), 64);

    let text = place.run(&[&["plan", "--measure-steps", "0"], &args[..]].concat());
    let text = succeeded(&text);
    assert!(
        text.contains("trained   ") && text.contains("memory    about") && !text.contains("time"),
        "{text}"
    );
    failed(2, "--data is missing", &place.run(&["plan", "--model", "model"]));
}

#[test]
fn a_card_says_what_the_adapter_is_made_of() {
    let place = Workplace::new();
    fs::write(
        place.path("model/README.md"),
        "---\nlicense: mit\nlicense_link: a\"b\n---\n",
    )
    .unwrap();
    let config = fs::read_to_string(place.path("model/config.json")).unwrap();
    let mut config = json_of(&config);
    config["_name_or_path"] = json!("someone/tiny");
    fs::write(place.path("model/config.json"), config.to_string()).unwrap();
    let output = place.sft("run", &["--max-steps", "2", "--eval-data", "train.jsonl"]);
    succeeded(&output);
    let card = fs::read_to_string(place.path("run/README.md")).unwrap();
    let sum = succeeded(
        &std::process::Command::new("sha256sum")
            .arg(place.path("train.jsonl"))
            .output()
            .unwrap(),
    );
    for part in [
        "---\nbase_model: \"someone/tiny\"\nbase_model_relation: adapter\nlicense: \"mit\"\nlicense_link: \"a\\\"b\"\n",
        "language:\n- \"fr\"\n- \"nl\"\n",
        "library_name: peft\n",
        &sum[..64],
        "PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained('someone/tiny'), 'run')",
        "pipit-convert model 'someone/tiny' --adapter 'run'",
        "8 rows of the evaluation data were trained on too",
        "    learning_rate = 0.01\n",
        "made by AI",
    ] {
        assert!(card.contains(part), "{part:?} is not in\n{card}");
    }
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(
        said.contains("rows that are trained on too (what is measured on them is memory): 8"),
        "{said}"
    );

    succeeded(&place.sft("whole", &["--max-steps", "1", "--method", "full"]));
    let card = fs::read_to_string(place.path("whole/README.md")).unwrap();
    assert!(
        card.contains("base_model_relation: finetune\n") && card.contains("library_name: transformers\n")
    );
    assert!(!card.contains("peft"));
}

#[test]
fn eval_writes_its_answers_and_counts_json() {
    let place = Workplace::new();
    let row = |answer: &str| json!({"language": "nl", "prompt": "w9 w10 ", "completion": answer});
    place.write("eval.jsonl", &[row(r#"{"intent":"on","slots":{}}"#), row("w12")]);
    let args = [
        "eval",
        "--model",
        "model",
        "--data",
        "eval.jsonl",
        "--max-new-tokens",
        "4",
        "--json",
    ];
    let eval = json_of(&succeeded(
        &place.run(&[&args[..], &["--samples", "out.jsonl", "--by", "language"]].concat()),
    ));
    // The model knows no brace: its answer is not JSON.
    assert_eq!(
        (&eval["valid_json"], &eval["fields"]["intent"]),
        (&json!(0.0), &json!(0.0))
    );
    assert_eq!(eval["by"]["nl"]["answered"], 2);
    let answers = lines_of(&place.path("out.jsonl"));
    assert_eq!((&answers[0]["line"], &answers[1]["line"]), (&json!(1), &json!(2)));
    assert_eq!(
        (&answers[1]["expected"], &answers[1]["by"]),
        (&json!("w12"), &json!("nl"))
    );
    assert!(answers[1]["loss"].as_f64().unwrap() > 0.0 && answers[1]["answer"].is_string());
    let text = succeeded(&place.run(&args[..args.len() - 1]));
    assert!(text.contains("valid JSON") && text.contains("intent"), "{text}");
}

#[test]
fn rows_that_are_there_twice_and_rows_not_read_are_reported() {
    let place = Workplace::new();
    let mut rows = lines_of(&place.path("train.jsonl"));
    rows.push(rows[2].clone());
    rows.push(json!({"messages": [{"role": "user", "content": [{"type": "image"}]}, {"role": "assistant", "content": "w9"}]}));
    place.write("train.jsonl", &rows);
    let limit = [
        "--max-steps",
        "1",
        "--eval-data",
        "train.jsonl",
        "--max-eval-samples",
        "3",
    ];
    let output = place.sft("run", &limit);
    succeeded(&output);
    let summary = json_of(&fs::read_to_string(place.path("run/summary.json")).unwrap());
    assert_eq!(summary["data"]["duplicates"], json!([[9, 3]]));
    assert_eq!(summary["data"]["broken"][0][0], 10);
    assert_eq!(
        (
            &summary["eval_data"]["rows"],
            &summary["eval_data"]["beyond_limit"]
        ),
        (&json!(3), &json!(7))
    );
    let said = String::from_utf8_lossy(&output.stderr);
    for part in [
        "not readable: 1 (line 10: message 1: its `content` is a list of parts",
        "there twice: 1 (line 9 = 3)",
        "3 of 10 rows",
    ] {
        assert!(said.contains(part), "{part:?} is not in {said}");
    }
}

#[test]
fn calls_of_tools_are_trained_on_as_the_template_writes_them() {
    let place = Workplace::new();
    let template = "{% for t in tools or [] %}{{ t.name }} {% endfor %}\
        {% for m in messages %}{{ '<bot> ' if m.role == 'assistant' else '<user> ' }}\
        {{ m.tool_calls[0].function.name if m.tool_calls else m.content }} <end>\n{% endfor %}\
        {% if add_generation_prompt %}<bot> {% endif %}";
    fs::write(place.path("model/chat_template.jinja"), template).unwrap();
    let ask = json!({"role": "user", "content": "w9"});
    let call = json!({"role": "assistant", "content": null, "tool_calls": [{"function": {"name": "w41"}}]});
    let result = json!({"role": "tool", "content": "w42"});
    let answer = json!({"role": "assistant", "content": "w43"});
    let rows = [
        json!({"tools": [{"name": "w40"}], "messages": [ask, call, result, answer]}),
        json!({"messages": [ask, call]}),
    ];
    place.write("calls.jsonl", &rows);
    let args = [
        "eval",
        "--model",
        "model",
        "--data",
        "calls.jsonl",
        "--samples",
        "out.jsonl",
        "--json",
    ];
    let eval = json_of(&succeeded(&place.run(&args)));
    // w40 and three tokens of each message; a turn of the assistant is trained on with its end.
    assert_eq!(
        (&eval["data"]["tokens"], &eval["data"]["trained_tokens"]),
        (&json!(19), &json!(6))
    );
    let answers = lines_of(&place.path("out.jsonl"));
    assert_eq!(
        (&answers[0]["expected"], &answers[1]["expected"]),
        (&json!("w43"), &json!("w41"))
    );
    assert_eq!(answers[1]["question"], "w9");
}

#[cfg(not(feature = "parquet"))]
#[test]
fn a_parquet_file_is_refused_with_the_features_name() {
    let place = Workplace::new();
    fs::copy(fixture("rows.parquet"), place.path("rows.parquet")).unwrap();
    let output = place.run(&["sft", "--model", "model", "--data", "rows.parquet", "-o", "run"]);
    place.refused(1, "--features parquet", &output);
}

#[cfg(feature = "parquet")]
#[test]
fn a_parquet_file_gives_the_rows_that_jsonl_gives() {
    let place = Workplace::new();
    fs::copy(fixture("rows.parquet"), place.path("rows.parquet")).unwrap();
    let turn = |role: &str, content: &str| json!({"role": role, "content": content});
    place.write("rows.jsonl", &[
        json!({"messages": [turn("user", "w9 w10"), turn("assistant", "w20 w21")], "language": "nl"}),
        json!({"prompt": "w5 w6 ", "completion": "w7 w8", "language": "fr"}),
        json!({"text": "w30 w31 w32\nw33", "language": "fr"}),
        json!({"language": "de"}),
        json!({"messages": [turn("system", "w11"), turn("user", "w12"), turn("assistant", "w13"), turn("user", "w14"),
            turn("assistant", "w15")], "language": "de"}),
    ]);
    let eval = |data: &str| {
        let args = [
            "eval",
            "--model",
            "model",
            "--data",
            data,
            "--by",
            "language",
            "--no-generate",
            "--json",
        ];
        json_of(&succeeded(&place.run(&args)))
    };
    let (jsonl, parquet) = (eval("rows.jsonl"), eval("rows.parquet"));
    assert_eq!(jsonl, parquet);
    assert_eq!(
        (&parquet["rows"], &parquet["data"]["broken"][0][0]),
        (&json!(4), &json!(4))
    );

    let whole = fs::read(place.path("rows.parquet")).unwrap();
    for cut in [0, 3, 700, whole.len() - 9] {
        fs::write(place.path("cut.parquet"), &whole[..cut]).unwrap();
        let output = place.run(&["sft", "--model", "model", "--data", "cut.parquet", "-o", "run"]);
        place.refused(1, "cannot be read as Parquet", &output);
    }
}
