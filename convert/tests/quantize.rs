//! Every tensor has the type and the bits that llama.cpp's own quantiser gives it.

#![allow(clippy::unwrap_used, reason = "tests")]

mod support;

use std::path::{Path, PathBuf};

use pipit_convert::gguf::{Gguf, TensorType};
use pipit_convert::model::{ModelError, Plan, SourceModel};
use pipit_convert::progress::Silent;
use pipit_convert::quantize::{FileType, Importance, QuantizeError, Recipe, TypeOverride};
use support::llama_quantize::{self, Options};
use support::synthetic::{Random, SMALL, Shape, Weights, checkpoint};

/// A checkpoint, and the GGUF file that llama.cpp starts from.
struct Model {
    scratch: tempfile::TempDir,
    checkpoint: PathBuf,
    gguf: PathBuf,
}

impl Model {
    fn new(shape: &Shape, weights: Weights) -> Self {
        Self::stored(shape, weights, FileType::F32)
    }

    fn stored(shape: &Shape, weights: Weights, file: FileType) -> Self {
        let scratch = tempfile::tempdir().unwrap();
        let dir = scratch.path().join("checkpoint");
        std::fs::create_dir(&dir).unwrap();
        checkpoint(&dir, shape, weights);
        let gguf = scratch.path().join("model.gguf");
        convert(&dir, &Recipe::new(file), &gguf).unwrap();
        Self {
            checkpoint: dir,
            gguf,
            scratch,
        }
    }

    /// Quantises both ways and compares every tensor and the keys that say how the file was made.
    fn compare(&self, options: &Options<'_>) -> Result<Gguf, ModelError> {
        let (ours, theirs) = (
            self.scratch.path().join("ours.gguf"),
            self.scratch.path().join("theirs.gguf"),
        );
        let overrides = options.overrides.iter();
        let recipe = Recipe {
            file: options.file,
            pure: options.pure,
            leave_output: options.leave_output,
            output_type: options.output_type,
            embedding_type: options.embedding_type,
            overrides: overrides
                .map(|(pattern, kind)| TypeOverride::parse(&format!("{pattern}={kind}")).unwrap())
                .collect(),
            imatrix: options.imatrix.map(|weights| Importance {
                weights: weights.iter().cloned().collect(),
                ..Importance::default()
            }),
        };
        let done = convert(&self.checkpoint, &recipe, &ours);
        let theirs_done = llama_quantize::quantize(&self.gguf, &theirs, options);
        assert_eq!(done.is_ok(), theirs_done, "{options:?}: {done:?}");
        let ours = done?;
        let theirs = Gguf::open(&theirs).unwrap();
        assert_eq!(ours.tensors().len(), theirs.tensors().len());
        for tensor in theirs.tensors() {
            let own = ours.tensor(&tensor.name).unwrap();
            assert_eq!(own.kind, tensor.kind, "{} in {options:?}", tensor.name);
            assert!(
                ours.data(own) == theirs.data(tensor),
                "{} of {:?} differs in {options:?}",
                tensor.name,
                tensor.dimensions
            );
        }
        for key in ["general.file_type", "general.quantization_version"] {
            assert_eq!(ours.get(key), theirs.get(key), "{key}");
        }
        Ok(ours)
    }

    /// The same, where a recipe may be one that both refuse.
    fn check(&self, options: &Options<'_>) {
        match self.compare(options) {
            Ok(_) => {}
            // Rows that are no whole blocks of 128, for which llama.cpp has no fallback.
            Err(ModelError::Recipe(QuantizeError::NoFallback { kind: "Q1_0", .. })) => {}
            Err(ModelError::Quantize {
                source: QuantizeError::NeedsImatrix { .. },
                ..
            }) if options.imatrix.is_none() => {}
            Err(e) => panic!("{options:?}: {e}"),
        }
    }
}

/// Quantises a file as llama-quantize does, from the same file.
fn compare_real(file: &Path, quantised: &[(FileType, bool)]) {
    let scratch = tempfile::tempdir().unwrap();
    let weights = imatrix(&Gguf::open(file).unwrap());
    let model = Model {
        scratch,
        checkpoint: file.to_path_buf(),
        gguf: file.to_path_buf(),
    };
    for (file, with_imatrix) in quantised {
        let imatrix = with_imatrix.then_some(&weights[..]);
        model
            .compare(&Options {
                imatrix,
                ..Options::new(*file)
            })
            .unwrap();
    }
}

/// All types of both: references/compare_quantize.py.
#[test]
fn smollm2_has_llama_cpps_bits() {
    compare_real(
        &support::smollm2(),
        &[
            (FileType::Q4_K_M, false),
            (FileType::IQ4_XS, true),
            (FileType::Q4_1, false),
        ],
    );
}

#[test]
fn gemma_has_llama_cpps_bits() {
    compare_real(
        &support::gemma3(),
        &[(FileType::Q4_0, true), (FileType::Q5_K_M, false)],
    );
}

fn convert(checkpoint: &Path, recipe: &Recipe, out: &Path) -> Result<Gguf, ModelError> {
    let mut model = SourceModel::open(checkpoint)?;
    // Hundreds of files have the same tokenizer, which is not the matter here.
    model.skip_tokenizer_proof();
    Plan::new(&model, &[], recipe)?.write(out, None, &Silent)?;
    Ok(Gguf::open(out).unwrap())
}

/// Weights for every matrix: mean squares differ widely between columns.
fn imatrix(model: &Gguf) -> Vec<(String, Vec<f32>)> {
    let mut random = Random(2);
    let matrices = model
        .tensors()
        .iter()
        .filter(|tensor| tensor.dimensions.len() == 2);
    let weights = matrices.map(|tensor| {
        let columns = tensor.row_elements();
        let weights = (0..columns).map(|_| (random.unit() * 6.0 - 3.0).exp()).collect();
        (tensor.name.clone(), weights)
    });
    weights.collect()
}

#[test]
fn every_mix_gives_every_tensor_llama_cpps_type() {
    for (layers, heads, kv_heads, tied, hidden) in [
        (8, 4, 1, true, 256),
        (16, 6, 2, false, 256),
        (2, 8, 1, false, 192),
        (2, 2, 2, true, 80),
    ] {
        let shape = Shape {
            hidden,
            feed_forward: 256,
            layers,
            heads,
            kv_heads,
            head_dim: 8,
            tied,
        };
        let model = Model::new(&shape, Weights::Zero);
        let weights = imatrix(&Gguf::open(&model.gguf).unwrap());
        for file in FileType::ALL {
            model.check(&Options::new(*file));
            let imatrix = Some(&weights[..]);
            model.check(&Options {
                imatrix,
                ..Options::new(*file)
            });
        }
    }
}

/// The types whose kernels search a codebook, hundreds of times slower than the others.
fn is_slow(file: FileType) -> bool {
    file.name().starts_with("IQ") && !file.name().starts_with("IQ4")
}

fn bits(shapes: &[(usize, usize)], files: impl Fn(FileType) -> bool) {
    for (hidden, feed_forward) in shapes {
        let shape = Shape {
            hidden: *hidden,
            feed_forward: *feed_forward,
            ..SMALL
        };
        let model = Model::new(&shape, Weights::Trained);
        let weights = imatrix(&Gguf::open(&model.gguf).unwrap());
        for file in FileType::ALL.iter().filter(|file| files(**file)) {
            for imatrix in [None, Some(&weights[..])] {
                let options = Options {
                    imatrix,
                    ..Options::new(*file)
                };
                model.check(&options);
            }
        }
    }
}

#[test]
fn short_rows_have_llama_cpps_bits() {
    bits(&[(32, 64), (64, 96), (96, 256)], |file| !is_slow(file));
}

#[test]
fn rows_of_whole_blocks_have_llama_cpps_bits() {
    bits(&[(256, 96), (1024, 32), (4096, 32)], |file| !is_slow(file));
}

#[test]
fn rows_that_need_a_fallback_have_llama_cpps_bits() {
    bits(&[(576, 96), (896, 64)], |file| !is_slow(file));
}

#[test]
fn codebooks_give_llama_cpps_bits() {
    bits(&[(96, 256), (512, 32)], is_slow);
}

#[test]
fn options_give_llama_cpps_bits() {
    let shape = Shape {
        hidden: 256,
        feed_forward: 96,
        tied: false,
        ..SMALL
    };
    let (tied, untied) = (
        Model::new(&Shape { tied: true, ..shape }, Weights::Trained),
        Model::new(&shape, Weights::Trained),
    );
    let of = Options::new;
    let overrides = [
        ("attn_(q|k)", TensorType::Q8_0),
        ("blk.1.attn_q", TensorType::Q2_K),
        ("ffn_down", TensorType::NVFP4),
        ("ffn_up", TensorType::F16),
    ];
    for options in [
        Options {
            pure: true,
            ..of(FileType::Q4_K_M)
        },
        Options {
            pure: true,
            ..of(FileType::MXFP4_MOE)
        },
        Options {
            output_type: Some(TensorType::Q5_1),
            ..of(FileType::Q4_0)
        },
        Options {
            output_type: Some(TensorType::Q8_0),
            ..of(FileType::F16)
        },
        Options {
            embedding_type: Some(TensorType::Q2_K),
            ..of(FileType::Q6_K)
        },
        Options {
            embedding_type: Some(TensorType::BF16),
            output_type: Some(TensorType::IQ4_NL),
            ..of(FileType::Q5_K_M)
        },
        Options {
            overrides: &overrides[..2],
            ..of(FileType::Q4_K_M)
        },
        Options {
            overrides: &overrides[3..],
            pure: true,
            ..of(FileType::Q3_K_L)
        },
    ] {
        untied.compare(&options).unwrap();
        tied.compare(&options).unwrap();
    }
    let stored = Model::stored(&shape, Weights::Trained, FileType::BF16);
    let leave_output = Options {
        leave_output: true,
        ..of(FileType::Q4_0)
    };
    let gguf = stored.compare(&leave_output).unwrap();
    assert_eq!(gguf.tensor("output.weight").unwrap().kind, TensorType::BF16);
    // Rows of 96 are no whole blocks of 64, and llama.cpp has no fallback for NVFP4.
    let refused = untied.compare(&Options {
        overrides: &overrides,
        ..of(FileType::Q4_K_M)
    });
    assert!(matches!(
        refused,
        Err(ModelError::Recipe(QuantizeError::NoFallback {
            kind: "NVFP4",
            ..
        }))
    ));
}

#[test]
fn a_type_of_their_own_that_does_not_fit_falls_back() {
    let model = Model::new(&SMALL, Weights::Trained);
    // llama-quantize aborts on this one: its rows of 64 are no whole blocks of 256.
    let mut recipe = Recipe::new(FileType::Q4_0);
    recipe.embedding_type = Some(TensorType::Q6_K);
    let out = model.scratch.path().join("out.gguf");
    let gguf = convert(&model.checkpoint, &recipe, &out).unwrap();
    assert_eq!(gguf.tensor("token_embd.weight").unwrap().kind, TensorType::Q8_0);
}

#[test]
fn what_needs_an_imatrix_names_the_tensor() {
    let model = Model::new(&Shape { hidden: 256, ..SMALL }, Weights::Trained);
    let out = model.scratch.path().join("out.gguf");
    let refused = |recipe: &Recipe| convert(&model.checkpoint, recipe, &out).unwrap_err().to_string();
    let mut recipe = Recipe::new(FileType::IQ2_XS);
    let message = refused(&recipe);
    assert!(
        message.contains("tensor blk.0.attn_q.weight: it becomes IQ2_XS, which needs"),
        "{message}"
    );
    let mut weights = imatrix(&Gguf::open(&model.gguf).unwrap());
    weights.retain(|(name, _)| name != "blk.1.attn_q.weight");
    recipe.imatrix = Some(Importance {
        weights: weights.into_iter().collect(),
        ..Importance::default()
    });
    let message = refused(&recipe);
    assert!(
        message.contains("tensor blk.1.attn_q.weight: ") && message.contains("nothing for this"),
        "{message}"
    );
    // The embeddings do not need one for IQ2_M's type, and abort without one for IQ2_XS.
    let mut recipe = Recipe::new(FileType::Q4_0);
    recipe.embedding_type = Some(TensorType::IQ2_XS);
    assert!(refused(&recipe).contains("tensor token_embd.weight: it becomes IQ2_XS"));
    let short = vec![1.0; 3];
    recipe = Recipe::new(FileType::Q4_K_M);
    recipe.imatrix = Some(Importance {
        weights: [("blk.0.attn_q.weight".to_owned(), short)].into(),
        ..Importance::default()
    });
    let message = refused(&recipe);
    assert!(
        message.contains("tensor blk.0.attn_q.weight: its importance matrix has 3 columns"),
        "{message}"
    );
}

#[test]
fn the_number_of_threads_changes_no_bit() {
    // Embeddings of several slabs.
    let shape = Shape {
        hidden: 1024,
        ..SMALL
    };
    let model = Model::new(&shape, Weights::Trained);
    let out = model.scratch.path().join("out.gguf");
    let bytes = [1, 2, 7].map(|threads| {
        let pool = rayon::ThreadPoolBuilder::new()
            .num_threads(threads)
            .build()
            .unwrap();
        pool.install(|| convert(&model.checkpoint, &Recipe::new(FileType::Q4_K_M), &out))
            .unwrap();
        std::fs::read(&out).unwrap()
    });
    assert!(bytes[0] == bytes[1] && bytes[0] == bytes[2]);
}
