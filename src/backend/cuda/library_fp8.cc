#include "backend/cuda/library_fp8.h"

namespace drover::cuda {

#define DROVER_LT(call)                                       \
  do {                                                        \
    const cublasStatus_t drover_s_ = (call);                  \
    if (drover_s_ != CUBLAS_STATUS_SUCCESS) return drover_s_; \
  } while (false)

// Column-major as cuBLAS sees it: out^T [n, rows] = w [n, k] * in^T [k, rows].
cublasStatus_t LibraryFp8::describe(int64_t n, int64_t k, int64_t rows, bool f32_out) {
#if CUDART_VERSION < 12090
  (void)n, (void)k, (void)rows, (void)f32_out;
  return CUBLAS_STATUS_NOT_SUPPORTED;
#else
  DROVER_LT(cublasLtMatmulDescCreate(&operation_, CUBLAS_COMPUTE_32F, CUDA_R_32F));
  const cublasOperation_t transposed = CUBLAS_OP_T;
  DROVER_LT(cublasLtMatmulDescSetAttribute(operation_, CUBLASLT_MATMUL_DESC_TRANSA, &transposed,
                                           sizeof(transposed)));
  const cublasLtMatmulMatrixScale_t each_row = CUBLASLT_MATMUL_MATRIX_SCALE_OUTER_VEC_32F;
  for (const auto which : {CUBLASLT_MATMUL_DESC_A_SCALE_MODE, CUBLASLT_MATMUL_DESC_B_SCALE_MODE})
    DROVER_LT(cublasLtMatmulDescSetAttribute(operation_, which, &each_row, sizeof(each_row)));
  // Without pointers there is no way to be found; the real ones come with each call.
  alignas(16) static const float none = 0;
  const float* anywhere = &none;
  for (const auto which :
       {CUBLASLT_MATMUL_DESC_A_SCALE_POINTER, CUBLASLT_MATMUL_DESC_B_SCALE_POINTER})
    DROVER_LT(cublasLtMatmulDescSetAttribute(operation_, which, &anywhere, sizeof(anywhere)));
  const auto un = static_cast<uint64_t>(n), uk = static_cast<uint64_t>(k),
             um = static_cast<uint64_t>(rows);
  DROVER_LT(cublasLtMatrixLayoutCreate(&w_, CUDA_R_8F_E4M3, uk, un, k));
  DROVER_LT(cublasLtMatrixLayoutCreate(&in_, CUDA_R_8F_E4M3, uk, um, k));
  DROVER_LT(cublasLtMatrixLayoutCreate(&out_, f32_out ? CUDA_R_32F : CUDA_R_16BF, un, um, n));
  cublasLtMatmulPreference_t preference = nullptr;
  DROVER_LT(cublasLtMatmulPreferenceCreate(&preference));
  int found = 0;
  cublasStatus_t status =
      cublasLtMatmulPreferenceSetAttribute(preference, CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES,
                                           &workspace_bytes_, sizeof(workspace_bytes_));
  if (status == CUBLAS_STATUS_SUCCESS)
    status = cublasLtMatmulAlgoGetHeuristic(handle_, operation_, w_, in_, out_, out_, preference, 1,
                                            &choice_, &found);
  cublasLtMatmulPreferenceDestroy(preference);
  if (status == CUBLAS_STATUS_SUCCESS && found == 0) return CUBLAS_STATUS_NOT_SUPPORTED;
  return status;
#endif
}

std::unique_ptr<LibraryFp8> LibraryFp8::make(cublasLtHandle_t handle, int64_t n, int64_t k,
                                             int64_t rows, size_t workspace_bytes, bool f32_out) {
  std::unique_ptr<LibraryFp8> p(new LibraryFp8);
  p->handle_ = handle, p->workspace_bytes_ = workspace_bytes;
  if (p->describe(n, k, rows, f32_out) != CUBLAS_STATUS_SUCCESS) return nullptr;
  return p;
}

LibraryFp8::~LibraryFp8() {
  if (out_ != nullptr) cublasLtMatrixLayoutDestroy(out_);
  if (in_ != nullptr) cublasLtMatrixLayoutDestroy(in_);
  if (w_ != nullptr) cublasLtMatrixLayoutDestroy(w_);
  if (operation_ != nullptr) cublasLtMatmulDescDestroy(operation_);
}

cublasStatus_t LibraryFp8::run(const void* w, const float* w_scale, const void* in,
                               const float* in_scale, void* out, void* workspace, cudaStream_t s) {
  DROVER_LT(cublasLtMatmulDescSetAttribute(operation_, CUBLASLT_MATMUL_DESC_A_SCALE_POINTER,
                                           &w_scale, sizeof(w_scale)));
  DROVER_LT(cublasLtMatmulDescSetAttribute(operation_, CUBLASLT_MATMUL_DESC_B_SCALE_POINTER,
                                           &in_scale, sizeof(in_scale)));
  const float one = 1, zero = 0;
  return cublasLtMatmul(handle_, operation_, &one, w, w_, in, in_, &zero, out, out_, out, out_,
                        &choice_.algo, workspace, workspace_bytes_, s);
}

}  // namespace drover::cuda
