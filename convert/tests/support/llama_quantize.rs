//! llama.cpp's own quantiser, called in this process, to compare with.

use std::ffi::{CStr, CString, c_char, c_void};
use std::path::Path;

use llama_cpp_sys_2 as sys;
use pipit_convert::gguf::TensorType;
use pipit_convert::quantize::FileType;

/// What `llama-quantize` can be told.
#[derive(Debug, Clone)]
pub(crate) struct Options<'a> {
    pub(crate) file: FileType,
    pub(crate) pure: bool,
    pub(crate) leave_output: bool,
    pub(crate) output_type: Option<TensorType>,
    pub(crate) embedding_type: Option<TensorType>,
    pub(crate) overrides: &'a [(&'a str, TensorType)],
    pub(crate) imatrix: Option<&'a [(String, Vec<f32>)]>,
}

impl Options<'_> {
    pub(crate) fn new(file: FileType) -> Self {
        Self {
            file,
            pure: false,
            leave_output: false,
            output_type: None,
            embedding_type: None,
            overrides: &[],
            imatrix: None,
        }
    }
}

/// Quantises `input` to `output` with `llama_model_quantize`. False when it refuses.
pub(crate) fn quantize(input: &Path, output: &Path, options: &Options<'_>) -> bool {
    let c_path = |path: &Path| CString::new(path.to_str().unwrap()).unwrap();
    let (input, output) = (c_path(input), c_path(output));
    let patterns: Vec<_> = options
        .overrides
        .iter()
        .map(|(pattern, kind)| (CString::new(*pattern).unwrap(), *kind))
        .collect();
    let ggml_type = |kind: TensorType| kind.id() as sys::ggml_type;
    let mut overrides: Vec<_> = patterns
        .iter()
        .map(|(pattern, kind)| sys::llama_model_tensor_override {
            pattern: pattern.as_ptr(),
            type_: ggml_type(*kind),
        })
        .collect();
    overrides.push(sys::llama_model_tensor_override {
        pattern: std::ptr::null(),
        type_: sys::GGML_TYPE_COUNT,
    });
    let names: Vec<_> = options
        .imatrix
        .unwrap_or(&[])
        .iter()
        .map(|(name, values)| (CString::new(name.as_str()).unwrap(), values))
        .collect();
    let mut imatrix: Vec<_> = names
        .iter()
        .map(|(name, values)| sys::llama_model_imatrix_data {
            name: name.as_ptr(),
            data: values.as_ptr(),
            size: values.len(),
        })
        .collect();
    imatrix.push(sys::llama_model_imatrix_data {
        name: std::ptr::null(),
        data: std::ptr::null(),
        size: 0,
    });
    // SAFETY: the paths, the patterns and the importance matrix outlive the call, and both lists end with a null,
    // as llama.h asks.
    #[expect(unsafe_code, reason = "llama.cpp is C++")]
    let failed = unsafe {
        sys::llama_log_set(Some(log), std::ptr::null_mut());
        let mut params = sys::llama_model_quantize_default_params();
        params.nthread = 2;
        params.ftype = options.file.number();
        params.allow_requantize = true;
        params.pure_ = options.pure;
        params.quantize_output_tensor = !options.leave_output;
        params.output_tensor_type = options.output_type.map_or(sys::GGML_TYPE_COUNT, ggml_type);
        params.token_embedding_type = options.embedding_type.map_or(sys::GGML_TYPE_COUNT, ggml_type);
        if !options.overrides.is_empty() {
            params.tt_overrides = overrides.as_ptr();
        }
        if options.imatrix.is_some() {
            params.imatrix = imatrix.as_ptr();
        }
        sys::llama_model_quantize(input.as_ptr(), output.as_ptr(), &params)
    };
    failed == 0
}

/// Passes on what llama.cpp has to say of errors; its progress would bury everything else.
#[expect(unsafe_code, reason = "a callback from C")]
unsafe extern "C" fn log(level: sys::ggml_log_level, text: *const c_char, _: *mut c_void) {
    if level == sys::GGML_LOG_LEVEL_ERROR {
        // SAFETY: llama.cpp passes a string that ends with a null.
        eprint!("{}", unsafe { CStr::from_ptr(text) }.to_string_lossy());
    }
}
