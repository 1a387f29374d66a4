# The CUDA backend: every kernels/cuda/*.cu goes into lorad_kernels, with LORAD_CUDA_BUILT defined
# for kernels/ alone. LORAD_CUDA: AUTO builds it when there are sources and an nvcc, ON insists on
# both, OFF leaves it out.
file(GLOB cuda_sources CONFIGURE_DEPENDS kernels/cuda/*.cu)
set(lorad_cuda_built OFF)
if(NOT LORAD_CUDA STREQUAL OFF AND cuda_sources)
  find_program(LORAD_NVCC nvcc HINTS ENV CUDACXX PATHS /usr/local/cuda/bin)
  if(LORAD_NVCC)
    set(lorad_cuda_built ON)
  endif()
endif()
if(LORAD_CUDA STREQUAL ON AND NOT lorad_cuda_built)
  message(FATAL_ERROR "LORAD_CUDA=ON, but there is no nvcc (PATH, /usr/local/cuda/bin) or no "
                      "source in kernels/cuda")
endif()

if(lorad_cuda_built)
  set(CMAKE_CUDA_COMPILER ${LORAD_NVCC})
  # Machine code for A100, H100 and B200, PTX for what comes later.
  if(NOT CMAKE_CUDA_ARCHITECTURES)
    set(CMAKE_CUDA_ARCHITECTURES 80-real 90a-real 100-real 80-virtual)
  endif()
  enable_language(CXX)
  enable_language(CUDA)
  set(CMAKE_CUDA_FLAGS_RELEASE "-O3 -lineinfo")
  find_package(CUDAToolkit REQUIRED)
  set_target_properties(lorad_kernels PROPERTIES CUDA_STANDARD 17
                        CUDA_ARCHITECTURES "${CMAKE_CUDA_ARCHITECTURES}")
  target_sources(lorad_kernels PRIVATE ${cuda_sources})
  target_compile_definitions(lorad_kernels PRIVATE LORAD_CUDA_BUILT=1)
  # cuBLASLt is loaded when a device is opened: kernels/cuda/cublaslt.cuh.
  target_link_libraries(lorad_kernels PRIVATE CUDA::cudart_static ${CMAKE_DL_LIBS})
endif()
message(STATUS "CUDA backend: ${lorad_cuda_built}")
